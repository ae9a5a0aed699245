"""The metadata of a request, as session builders read it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from worker.errors import InvalidHeader

# Text, or bytes where the name ends in "-bin". ``Any``, because the name decides it, which no type can say.
HeaderValue: TypeAlias = Any


class Headers(Mapping[str, HeaderValue]):
    """A read-only multi-map of header names to values; names compare without regard to case.

    Values are ``str``, and ``bytes`` for names that end in ``-bin`` (gRPC over HTTP/2, *Custom-Metadata*). Its
    ``repr`` shows the names alone: values hold tokens.
    """

    __slots__ = ("_values",)

    def __init__(self, pairs: Iterable[tuple[str, str | bytes]] = ()) -> None:
        values: dict[str, tuple[str | bytes, ...]] = {}
        for name, value in pairs:
            name = name.lower()
            if name.endswith("-bin"):
                value = value.encode() if isinstance(value, str) else bytes(value)
            elif isinstance(value, bytes):
                value = value.decode("utf-8", "surrogateescape")
            values[name] = (*values.get(name, ()), value)
        self._values = values

    def __getitem__(self, name: str) -> HeaderValue:
        """The one value of ``name``.

        Raises:
            KeyError: the request has no such header.
            InvalidHeader: it was sent more than once, so that which one is meant is anybody's guess.
        """
        values = self._values[name.lower()]
        if len(values) > 1:
            raise InvalidHeader(f"header {name.lower()!r} was sent {len(values)} times, once is right")
        return values[0]

    def get_all(self, name: str) -> tuple[HeaderValue, ...]:
        """Every value of ``name``, in the order they were sent; empty when there is none."""
        return self._values.get(name.lower(), ())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Headers({', '.join(self._values)})"

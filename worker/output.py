"""What a request's headers say about the batches that it gets. Pure parsing.

The names are those that coordinators of Distributed DataFusion send their settings under.
"""

from collections.abc import Mapping
from typing import TypeVar, get_args

from worker.config import Compression
from worker.errors import InvalidHeader
from worker.headers import Headers

T = TypeVar("T")

CONFIG_PREFIX = "x-datafusion-distributed-config-"
COMPRESSION = CONFIG_PREFIX + "distributed.compression"

# An option of DataFusion's that has text and bytes leave as plain ones instead of views.
EXPAND_VIEWS_OPTION = "datafusion.optimizer.expand_views_at_output"
EXPAND_VIEWS = CONFIG_PREFIX + EXPAND_VIEWS_OPTION


def compression(headers: Headers) -> Compression | None:
    """How the request wants bodies to be compressed; None where it does not say.

    Raises:
        InvalidHeader: it says something else.
    """
    known: tuple[Compression, ...] = get_args(Compression)
    return one_of(dict(zip(known, known, strict=True)), headers, COMPRESSION, ", ".join(known))


def expand_views(headers: Headers) -> bool | None:
    """Whether the request wants plain text and bytes instead of views; None where it does not say.

    Raises:
        InvalidHeader: it says something else.
    """
    return one_of({"true": True, "false": False}, headers, EXPAND_VIEWS, "true or false")


def one_of(known: Mapping[str, T], headers: Headers, name: str, right: str) -> T | None:
    """What a header that has few values means; None where it is not there.

    Raises:
        InvalidHeader: it has another value, which the text says next to the ``right`` ones.
    """
    value = headers.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or value not in known:
        raise InvalidHeader(f"header {name!r} is {value!r}: {right} is right")
    return known[value]

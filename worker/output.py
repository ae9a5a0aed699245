"""What a request's headers say about the batches that it gets. Pure parsing.

The names are those that coordinators of Distributed DataFusion send their settings under.
"""

from typing import Literal, TypeAlias, get_args

from worker.errors import InvalidHeader
from worker.headers import Headers

Compression: TypeAlias = Literal["none", "lz4", "zstd"]

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
    value = headers.get(COMPRESSION)
    if value is None:
        return None
    for known in get_args(Compression):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise _invalid(COMPRESSION, value, ", ".join(get_args(Compression)))


def expand_views(headers: Headers) -> bool | None:
    """Whether the request wants plain text and bytes instead of views; None where it does not say.

    Raises:
        InvalidHeader: it says something else.
    """
    value = headers.get(EXPAND_VIEWS)
    if value is None:
        return None
    if value not in ("true", "false"):
        raise _invalid(EXPAND_VIEWS, value, "true or false")
    return bool(value == "true")


def _invalid(name: str, value: object, right: str) -> InvalidHeader:
    return InvalidHeader(f"header {name!r} is {value!r}: {right} is right")

"""What a coordinator's settings, which come as headers, say to a worker. Pure parsing.

Names and defaults are those of ``DistributedConfig`` in Distributed DataFusion 4.0.0.
"""

from dataclasses import dataclass
from typing import Self

from datafusion import SessionConfig

from worker import output
from worker.config import MEBIBYTE, Compression
from worker.errors import InvalidHeader
from worker.headers import Headers
from worker.output import CONFIG_PREFIX
from worker.session import SessionStateBuilder

_DISTRIBUTED = CONFIG_PREFIX + "distributed."
_DATAFUSION = CONFIG_PREFIX + "datafusion."
_BATCH_SIZE = "datafusion.execution.batch_size"
_OUTPUT_FILES = "datafusion.execution.minimum_parallel_output_files"

# What is for others: how SQL is planned, which has been done, and what SQL means to a session builder that uses some;
# and joins that take memory for the range of their keys, where the density that they want allows it: no pool counts
# that, and two keys that are far apart end the process.
_NOT_APPLIED = tuple(
    _DATAFUSION + name for name in ("catalog.", "explain.", "optimizer.", "sql_parser.", "execution.perfect_hash_join_")
)

# Rows of a batch where neither the coordinator nor the session builder says. With DataFusion's default of 8192 messages
# are a tenth of what is sent fastest, since a batch is of one partition of a shuffle.
BATCH_SIZE = 16384

# The most. DataFusion reserves memory for so many rows of each partition, and aborts the process where there is none;
# likewise for so many files that it writes.
MAX_BATCH_SIZE = MAX_OUTPUT_FILES = 1 << 20

# Rust's ``usize``, which these numbers are.
_LARGEST = (1 << 64) - 1

# What gRPC itself puts into the metadata of a request, or reads from it: not to be passed on.
_TRANSPORT = ("user-agent", "te", "content-type", "grpc-", ":")


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """The settings that mean something to a worker."""

    compression: Compression = "lz4"
    collect_metrics: bool = True
    shuffle_batch_size: int = 0
    """Rows of a batch; 0 for what the session says otherwise."""
    buffer_budget: int = 64 * MEBIBYTE
    """Bytes that are held for one connection to another worker."""

    @classmethod
    def from_headers(cls, headers: Headers) -> Self:
        """Reads them.

        Raises:
            InvalidHeader: a value makes no sense.
        """
        default = cls()
        collect = headers.get(_DISTRIBUTED + "collect_metrics", "true")
        if collect not in ("true", "false"):
            raise InvalidHeader(f"header '{_DISTRIBUTED}collect_metrics' is {collect!r}: true or false is right")
        batch_size = _number(headers, "shuffle_batch_size", default.shuffle_batch_size)
        _check_batch_size(_DISTRIBUTED + "shuffle_batch_size", batch_size)
        return cls(
            compression=output.compression(headers) or default.compression,
            collect_metrics=collect == "true",
            shuffle_batch_size=batch_size,
            buffer_budget=_number(headers, "worker_connection_buffer_budget_bytes", default.buffer_budget),
        )

    def apply(self, headers: Headers, builder: SessionStateBuilder) -> None:
        """Sets the options of DataFusion's that the coordinator sent, as far as the one here has them.

        Those that are for planning are not set.

        Raises:
            InvalidHeader: DataFusion refuses the value of one that it has, or it would take more memory than there is.
        """
        builder.with_config_option(_BATCH_SIZE, BATCH_SIZE)
        for name in headers:
            if name.startswith(_DATAFUSION) and not name.startswith(_NOT_APPLIED):
                option, value = name.removeprefix(CONFIG_PREFIX), headers[name]
                try:
                    SessionConfig().set(option, value)
                except Exception as error:
                    if "not found" in str(error):
                        continue
                    raise InvalidHeader(f"header {name!r} is {value!r}: {error}") from error
                if option == _BATCH_SIZE:
                    _check_batch_size(name, int(value))
                if option == _OUTPUT_FILES and int(value) > MAX_OUTPUT_FILES:
                    raise InvalidHeader(f"header {name!r} is {value!r}: {MAX_OUTPUT_FILES} files are the most")
                builder.with_config_option(option, value)
        if self.shuffle_batch_size:
            builder.with_config_option(_BATCH_SIZE, self.shuffle_batch_size)


def passed_on(headers: Headers) -> list[tuple[str, str | bytes]]:
    """The headers that go on to the workers that a task reads from: all but the transport's."""
    return [(name, value) for name in headers if not name.startswith(_TRANSPORT) for value in headers.get_all(name)]


def _check_batch_size(name: str, rows: int) -> None:
    if rows > MAX_BATCH_SIZE:
        raise InvalidHeader(f"header {name!r} is '{rows}': {MAX_BATCH_SIZE} rows are the most")


def _number(headers: Headers, name: str, default: int) -> int:
    value = headers.get(_DISTRIBUTED + name, str(default))
    is_number = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(_LARGEST))
    if not is_number or int(value) > _LARGEST:
        raise InvalidHeader(f"header '{_DISTRIBUTED}{name}' is {value!r}: a number up to {_LARGEST} is right")
    return int(value)

"""All settings of a worker, in one model: defaults here, then ``WORKER_…`` variables, then the command line."""

import contextlib
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, DirectoryPath, Field, FilePath, TypeAdapter
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.allocator import THREAD_STACK

MEBIBYTE = 1 << 20

# A number of bytes, which text may give in units too, such as "64MiB".
Bytes: TypeAlias = Annotated[int, BeforeValidator(TypeAdapter(ByteSize).validate_python)]

# For a tuple, whose values text separates by commas: ``Annotated[tuple[…], NoDecode, BY_COMMAS]``.
# (``NoDecode`` because variables are JSON to pydantic.)
BY_COMMAS = BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)

# URLs of workers as coordinators have them.
Urls: TypeAlias = Annotated[tuple[Annotated[str, Field(pattern=r"^https?://[^\s,]+$")], ...], NoDecode, BY_COMMAS]

# Which gRPC takes in milliseconds, of 31 bits.
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=2_000_000)]

Folders: TypeAlias = Annotated[tuple[DirectoryPath, ...], NoDecode, BY_COMMAS]

# An IPv6 address may be in brackets, as in URLs.
Host: TypeAlias = Annotated[str, AfterValidator(lambda host: re.sub(r"^\[(.*)\]$", r"\1", host))]

Compression: TypeAlias = Literal["none", "lz4", "zstd"]


# Of a control group's version 2, and of version 1.
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the control group's limit where that is less."""
    usable = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in MEMORY_LIMITS:
        with contextlib.suppress(OSError):
            limit = file.read_text().strip()
            if limit != "max":
                usable = min(usable, int(limit))
    return usable


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a server on ``host``; what is not known to be so is not."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


class UnfitSettings(Exception):
    """Settings that do not go together, or a file that one of them names is of no use."""


def _max_operands() -> int:
    """What fits into the stacks of DataFusion's threads, and with large ones what is executed within seconds.

    Those are of 2 MiB unless a variable says otherwise.
    """
    variable, large = THREAD_STACK
    stack = os.environ.get(variable, "")
    return 4000 if stack.isdecimal() and int(stack) >= int(large) else 1000


class PlanLimits(BaseModel):
    """What a plan may hold, beside its size (``worker/check.py``).

    DataFusion believes the numbers in a plan, and sets memory aside for them; where there is not so much, the process
    ends. Beyond other numbers a plan takes seconds or minutes to decode, with the GIL held.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    allow_nodes: Annotated[tuple[str, ...], NoDecode, BY_COMMAS] = Field(
        default_factory=tuple,
        description="kinds of plan nodes, by their names or numbers in DataFusion's protobuf, that are let through "
        "although the check of plans does not know them",
    )
    max_plan_nodes: int = Field(
        default=20_000, gt=0, description="the most nodes of a plan: those of a union are compared with each other"
    )
    max_plan_partitions: int = Field(
        default=1 << 16,
        gt=0,
        description="the most partitions of a node of a plan: each costs some kilobytes, read or not",
    )
    max_plan_channels: int = Field(
        default=1 << 18,
        gt=0,
        description="the most channels of a plan's repartitionings, partitions in times partitions out: "
        "each takes half a kilobyte",
    )
    max_plan_batch_size: int = Field(
        default=1 << 20,
        gt=0,
        description="the most rows that a node of a plan may set memory aside for: batch sizes, and the limits of "
        "aggregations",
    )
    max_plan_value_size: Bytes = Field(
        default=ByteSize(128 * 1024),
        gt=0,
        description="the largest value of a fixed size: a null takes as much, for every row",
    )
    max_plan_data_size: Bytes = Field(
        default=ByteSize(1024 * MEBIBYTE),
        gt=0,
        description="the most Arrow data inside of a plan, once it is decompressed: some hundred bytes can stand for "
        "megabytes",
    )
    max_plan_operands: int = Field(
        default_factory=_max_operands,
        gt=0,
        description="the most operands in a row, such as those of OR: DataFusion's stacks are as deep as they are many "
        "(4000, and 1000 where RUST_MIN_STACK is less than 128 MiB, unless set)",
    )
    max_plan_conjuncts: int = Field(
        default=512,
        gt=0,
        description="the same for operators other than OR, and keys of joins: the time to decode them grows with the "
        "cube; several count as one of the root of their squares' sum",
    )
    max_plan_columns: int = Field(
        default=10_000,
        gt=0,
        description="the most columns of a node of a plan, and sort keys of a plan: they are compared with each other",
    )
    max_plan_sort_columns: int = Field(
        default=1_000_000,
        gt=0,
        description="the most of a plan's sort keys times its columns that have a new name: each is looked for "
        "among the others, and 1,000,000 are 2 s of decoding",
    )


class Settings(PlanLimits, BaseSettings):
    """Every setting by its one name: ``Settings(idle_time=5)``, ``WORKER_IDLE_TIME=5``, ``--idle-time 5``.

    What is true or false is a flag on the command line: ``--reflection`` or ``--no-reflection``.

    Raises:
        pydantic.ValidationError: a value, also one from the environment, does not fit; the error names it.
    """

    model_config = SettingsConfigDict(env_prefix="WORKER_", env_ignore_empty=True, frozen=True, extra="forbid")

    host: Host = Field(default="127.0.0.1", description="the address to listen on; 0.0.0.0 for every IPv4 network")
    port: int = Field(default=8000, ge=0, le=65535, description="the port to listen on; 0 picks a free one")
    supervisor: bool = Field(
        default=True,
        description="whether workers are processes of their own, each replaced when it dies or hangs; without, "
        "this process is the worker",
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="how many workers the supervisor has, on ports that follow each other; they share the memory",
    )
    session_builder: str | None = Field(
        default=None,
        description="module:attr of the session builder; without it, every request has DataFusion's defaults",
    )
    location: str | None = Field(
        default=None,
        pattern=r"^grpc(\+tcp|\+tls)?://.+",
        description="this worker's own URI for the endpoints of GetFlightInfo, such as grpc://worker-3:8000; "
        "without it, clients come back on the connection they have",
    )
    version: str = Field(default="", description="what coordinators are told that this worker is, such as 2026-11-25")
    cluster_workers: Urls = Field(
        default_factory=tuple,
        description="the workers that there are, such as http://worker-1:8000,http://worker-2:8000: consoles show "
        "them, and plans may read from no others, except on a host of this machine alone; without it, consoles "
        "show those that plans of the same caller named in the last hour",
    )
    allow_path: Folders = Field(
        default_factory=tuple,
        description="folders whose files plans may name, such as /data/sales,/data/stock; without it any file on a "
        "host of this machine alone, and none on others",
    )
    allow_writes: bool = Field(
        default=False, description="whether plans may write files, where they may read some, and to object stores"
    )
    memory: Bytes = Field(
        default_factory=lambda: ByteSize(usable_memory() * 3 // 4),
        gt=0,
        description="for the memory pools of all tasks that run at the same time, such as 12GiB; three quarters of the "
        "machine's or container's memory unless set",
    )
    memory_limit: Bytes | None = Field(
        default=None,
        gt=0,
        description="DataFusion's memory pool for one task, beyond which it spills or fails, such as 4GiB; "
        "an eighth of memory unless set, 64MiB at least",
    )
    max_tasks: int = Field(
        default=1000, gt=0, description="how many tasks run at the same time, however little memory they need"
    )
    max_streams: int = Field(
        default=4000,
        gt=0,
        description="how many partitions are executed and read at the same time, each with some MB on their way",
    )
    max_waiting: int = Field(
        default=1000, ge=0, description="how many tasks wait until there is memory for them; more are refused"
    )
    max_wait: float = Field(
        default=30,
        ge=0,
        allow_inf_nan=False,
        description="seconds that a task waits for memory before it is refused",
    )
    max_duration: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="seconds after which a request is ended, such as 3600; without it, the client's deadline alone "
        "counts",
    )
    max_spill: Bytes | None = Field(
        default=None,
        ge=MEBIBYTE,
        description="what one task may spill to disk, and what all tasks together may keep there of other workers' "
        "rows, such as 100GiB; DataFusion's own limit for a task is 100GB",
    )
    spill_folder: DirectoryPath | None = Field(
        default=None,
        description="an existing folder that DataFusion spills to; the system's temporary folder unless set",
    )
    max_ticket_size: Bytes = Field(
        default=ByteSize(64 * MEBIBYTE),
        gt=0,
        le=2047 * MEBIBYTE,  # gRPC's limits are of 31 bits, and there is more in a request than its ticket
        description="the largest request that is read, tickets with their plans above all",
    )
    max_flight_info_size: Bytes = Field(
        default=ByteSize(16 * MEBIBYTE),
        gt=0,
        description="the largest answer of GetFlightInfo, which holds the plan once for every partition",
    )
    max_message_size: Bytes = Field(
        default=ByteSize(4 * MEBIBYTE),
        ge=MEBIBYTE // 16,
        le=2047 * MEBIBYTE,
        description="the largest message, 64KiB at least; clients of gRPC accept 4MiB unless they are told otherwise",
    )
    compression: Compression = Field(
        default="none",
        description="how what is sent is compressed, unless the request's headers say: none, lz4 or zstd",
    )
    idle_time: float = Field(
        default=60,
        gt=0,
        allow_inf_nan=False,
        description="seconds after which a task that has no open stream is forgotten",
    )
    grace: float = Field(
        default=30,
        ge=0,
        allow_inf_nan=False,
        description="seconds that running streams have to finish in after SIGTERM",
    )
    shutdown_delay: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="seconds between health NOT_SERVING and the refusal of new requests, for load balancers to notice",
    )
    tls_cert: FilePath | None = Field(
        default=None,
        description="a PEM file of the worker's certificate and those that vouch for it; with it, TLS is all there is. "
        "Read anew when it changes",
    )
    tls_key: FilePath | None = Field(default=None, description="a PEM file of the key of tls_cert, not encrypted")
    tls_client_ca: FilePath | None = Field(
        default=None,
        description="a PEM file of certificates; clients have to show one that these vouch for. Other workers are "
        "trusted by it too, and shown tls_cert",
    )
    auth_token_file: FilePath | None = Field(
        default=None,
        description="a file of tokens, 'token' or 'name:token' a line, one of which has to come with every request, "
        "as authorization: Bearer token. Read anew when it changes",
    )
    insecure: bool = Field(
        default=False,
        description="whether to listen for other machines even without TLS or without a check of who asks",
    )
    keepalive_time: Seconds = Field(
        default=60,
        description="seconds of silence on a connection after which the peer is asked whether it is there; "
        "load balancers forget connections that are silent for some minutes",
    )
    max_connection_age: Seconds | None = Field(
        default=None,
        description="seconds after which clients are to connect anew, so that load balancers spread them out again",
    )
    max_connection_age_grace: Seconds | None = Field(
        default=None,
        description="seconds that streams have to finish in on a connection that has reached max_connection_age; "
        "without it, as long as they take",
    )
    reflection: bool = Field(default=True, description="whether clients may ask which services and messages there are")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least that is logged: debug, info, warning or error"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="how log lines are written: text to read, or json, an object a line, to collect"
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="the port that Prometheus reads metrics from, on the address of host; 0 picks a free one; "
        "without it, there is none",
    )

    @property
    def pool_size(self) -> int:
        """Bytes of the memory pool of one task: ``memory_limit``, or what it is when it is not set."""
        if self.memory_limit is not None:
            return self.memory_limit
        # Large enough for joins, which cannot spill, and small enough for some tasks at a time.
        return max(self.memory // 8, min(self.memory, 64 * MEBIBYTE))

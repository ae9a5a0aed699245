"""A worker for distributed DataFusion: executes physical plans that come in Arrow Flight tickets.

Layers, each importing only from those before it: errors, message, ipc, allocator, interrupt, ending; headers, ticket,
config, output, logs, durations; files, tls, auth; plan_proto, session, plan, policy, partitionwise; views,
dictionaries, compact, compress, encode, decode, flight_data; stream; admission, watchdog, tasks; requests; servicer;
cluster; service; server, metrics, client, testing, importer; the command lines.
"""

from worker.allocator import keep_freed_memory
from worker.auth import TokenAuth
from worker.cluster.observability import add_ObservabilityServiceServicer_to_server
from worker.cluster.service import add_WorkerServiceServicer_to_server
from worker.config import Settings, UnfitSettings
from worker.errors import (
    DurationExceeded,
    EnginePanicked,
    ExecutionFailed,
    FailedPrecondition,
    InvalidHeader,
    InvalidPlan,
    InvalidRequest,
    InvalidTicket,
    MemoryExceeded,
    NotFound,
    PartitionOutOfRange,
    PermissionDenied,
    PlanNotSet,
    QueryEnded,
    QuotaExceeded,
    ResourcesExhausted,
    ResponseTooLarge,
    SessionBuilderFailed,
    StageKeyConflict,
    Unauthenticated,
    Unavailable,
    UpstreamFailed,
    WorkerBusy,
    WorkerError,
)
from worker.headers import Headers
from worker.policy import DefaultPolicy, PlanAccess, PlanPolicy, Touched
from worker.service import Worker, add_FlightServiceServicer_to_server, server_options
from worker.servicer import Statistics
from worker.session import (
    DefaultSessionBuilder,
    SessionBuilder,
    SessionStateBuilder,
    WorkerQueryContext,
    WorkerSessionBuilder,
)
from worker.ticket import PlanTicket, StageKey, plan_ticket

__all__ = [
    "DefaultPolicy",
    "DefaultSessionBuilder",
    "DurationExceeded",
    "EnginePanicked",
    "ExecutionFailed",
    "FailedPrecondition",
    "Headers",
    "InvalidHeader",
    "InvalidPlan",
    "InvalidRequest",
    "InvalidTicket",
    "MemoryExceeded",
    "NotFound",
    "PartitionOutOfRange",
    "PermissionDenied",
    "PlanAccess",
    "PlanNotSet",
    "PlanPolicy",
    "PlanTicket",
    "QueryEnded",
    "QuotaExceeded",
    "ResourcesExhausted",
    "ResponseTooLarge",
    "SessionBuilder",
    "SessionBuilderFailed",
    "SessionStateBuilder",
    "Settings",
    "StageKey",
    "StageKeyConflict",
    "Statistics",
    "TokenAuth",
    "Touched",
    "Unauthenticated",
    "Unavailable",
    "UnfitSettings",
    "UpstreamFailed",
    "Worker",
    "WorkerBusy",
    "WorkerError",
    "WorkerQueryContext",
    "WorkerSessionBuilder",
    "add_FlightServiceServicer_to_server",
    "add_ObservabilityServiceServicer_to_server",
    "add_WorkerServiceServicer_to_server",
    "keep_freed_memory",
    "plan_ticket",
    "server_options",
]

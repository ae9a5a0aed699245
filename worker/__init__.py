"""A worker for distributed DataFusion: executes physical plans that come in Arrow Flight tickets.

Layers, each importing only from those before it: errors, failures, message, ipc, allocator, exit, ending; headers,
ticket, config, grpc_options, output, logs, durations, metrics_server; supervision; files, tls, auth; plan_proto, check,
session, plan, policy, partitionwise; encoding; execution; requests; handlers, servicer; cluster; service; server,
metrics, client, testing, importer; serving; the command lines.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.allocator import keep_freed_memory
    from worker.auth import TokenAuth
    from worker.cluster.observability import add_ObservabilityServiceServicer_to_server
    from worker.cluster.service import add_WorkerServiceServicer_to_server
    from worker.config import Settings, UnfitSettings
    from worker.errors import (
        ComputationFailed,
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
        PlanQuarantined,
        PlanTooLarge,
        QueryEnded,
        QuotaExceeded,
        ResourcesExhausted,
        ResponseTooLarge,
        SessionBuilderFailed,
        SourceCorrupt,
        SourceDenied,
        SourceFailed,
        SourceNotFound,
        StageKeyConflict,
        Unauthenticated,
        Unavailable,
        UpstreamFailed,
        WorkerBusy,
        WorkerError,
    )
    from worker.grpc_options import server_options
    from worker.headers import Headers
    from worker.policy import DefaultPolicy, PlanAccess, PlanPolicy, Touched
    from worker.service import Worker, add_FlightServiceServicer_to_server
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
    "ComputationFailed",
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
    "PlanQuarantined",
    "PlanTicket",
    "PlanTooLarge",
    "QueryEnded",
    "QuotaExceeded",
    "ResourcesExhausted",
    "ResponseTooLarge",
    "SessionBuilder",
    "SessionBuilderFailed",
    "SessionStateBuilder",
    "Settings",
    "SourceCorrupt",
    "SourceDenied",
    "SourceFailed",
    "SourceNotFound",
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

if not TYPE_CHECKING:
    # Where these are, each before those that import it.
    _HOMES = (
        "allocator",
        "config",
        "grpc_options",
        "errors",
        "headers",
        "ticket",
        "auth",
        "session",
        "policy",
        "servicer",
        "service",
        "cluster.service",
        "cluster.observability",
    )

    def __getattr__(name):
        """What is exported, imported when it is first asked for: a supervisor loads nothing that its workers need."""
        if name in __all__:
            for home in _HOMES:
                module = import_module(f"worker.{home}")
                if hasattr(module, name):
                    globals()[name] = getattr(module, name)
                    return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

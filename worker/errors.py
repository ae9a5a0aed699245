"""What can go wrong, one class a cause, and the gRPC status that tells the client.

    WorkerError                  INTERNAL
    ├── InvalidRequest           INVALID_ARGUMENT     the base of what the client got wrong
    │   ├── InvalidTicket        INVALID_ARGUMENT     a ticket or descriptor that cannot be read
    │   ├── InvalidHeader        INVALID_ARGUMENT     a header that is missing, or there twice
    │   ├── InvalidPlan          INVALID_ARGUMENT     a plan that does not decode in this session
    │   ├── PartitionOutOfRange  INVALID_ARGUMENT     a partition that the plan does not have
    │   └── ComputationFailed    INVALID_ARGUMENT     a plan that divides by zero, or casts what cannot be cast
    ├── StageKeyConflict         FAILED_PRECONDITION  a stage key that stands for another plan
    ├── PlanQuarantined      FAILED_PRECONDITION  a plan that has ended the worker more than once
    ├── PlanTooLarge             RESOURCE_EXHAUSTED   a plan that has more of something than a limit allows
    ├── ResponseTooLarge         RESOURCE_EXHAUSTED   an answer beyond a limit of this worker
    ├── ResourcesExhausted       RESOURCE_EXHAUSTED   DataFusion ran out of its memory pool or disk
    ├── WorkerBusy               RESOURCE_EXHAUSTED   no place for the task or stream; a retry makes sense
    ├── MemoryExceeded           RESOURCE_EXHAUSTED   the process ran short of memory, and this task was the largest
    ├── DurationExceeded         DEADLINE_EXCEEDED    the request took longer than max_duration
    ├── SourceFailed             UNAVAILABLE          a file or an object store failed; the base of how
    │   ├── SourceNotFound       NOT_FOUND            a file or object that the plan reads is not there
    │   ├── SourceDenied         PERMISSION_DENIED    the store does not let this session read it
    │   └── SourceCorrupt        DATA_LOSS            a file is damaged, or not what the plan takes it for
    ├── ExecutionFailed          INTERNAL             DataFusion failed while it ran the plan
    ├── EnginePanicked           INTERNAL             DataFusion panicked; the worker goes on
    ├── UpstreamFailed           INTERNAL             or its own status: a worker that this one reads from failed
    ├── QueryEnded               CANCELLED            the coordinator ended the query
    ├── PlanNotSet               DEADLINE_EXCEEDED    no coordinator sent the plan of a task that was asked for
    ├── SessionBuilderFailed     INTERNAL             the session builder or the plan policy raised what is not below
    ├── Unauthenticated          UNAUTHENTICATED      for session builders: nobody said who asks
    ├── PermissionDenied         PERMISSION_DENIED    for session builders and plan policies: who asks may not
    ├── NotFound                 NOT_FOUND            for session builders
    ├── FailedPrecondition       FAILED_PRECONDITION  for session builders
    ├── QuotaExceeded            RESOURCE_EXHAUSTED   for session builders
    └── Unavailable              UNAVAILABLE          for session builders: try again later

The text of a ``WorkerError`` goes to the client as it is, so it never holds a secret.
"""

import grpc


class WorkerError(Exception):
    """The root of all errors that the worker answers with a status and their own text."""

    status: grpc.StatusCode = grpc.StatusCode.INTERNAL


class InvalidRequest(WorkerError):
    """The client sent something that no session and no retry would make right."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class InvalidTicket(InvalidRequest):
    """The ticket or descriptor is empty, is not a ``worker.plan.DoGet``, or lacks a field."""


class InvalidHeader(InvalidRequest):
    """A header is malformed, or was sent more than once where one value is meant."""


class InvalidPlan(InvalidRequest):
    """The plan does not decode: bad bytes, or a function or codec that the session lacks."""


class PartitionOutOfRange(InvalidRequest):
    """The ticket asks for a partition that the plan does not have."""


class ComputationFailed(InvalidRequest):
    """The plan asks for a value that there is not: of a division by zero, of a cast that fails, of an overflow."""


class StageKeyConflict(WorkerError):
    """The stage key already stands for a task with another plan."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class PlanQuarantined(WorkerError):
    """The plan has ended the worker more than once, and is refused for a while."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class PlanTooLarge(WorkerError):
    """The plan has more of something than a setting of this worker allows."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class ResponseTooLarge(WorkerError):
    """The answer would be larger than the worker's limit for it."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class ResourcesExhausted(WorkerError):
    """The task reached the limit of its memory pool, or of the disk for what it spills and is sent."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class WorkerBusy(WorkerError):
    """There was no place for the task within ``max_wait``, too many wait for one, or too many streams are open."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class MemoryExceeded(WorkerError):
    """The memory of the whole process came close to its limit, and this task was ended as the largest."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class DurationExceeded(WorkerError):
    """The request took longer than the worker's ``max_duration``."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class SourceFailed(WorkerError):
    """A file or object store did not give what the plan reads, after DataFusion has tried for some seconds."""

    status = grpc.StatusCode.UNAVAILABLE


class SourceNotFound(SourceFailed):
    """A file or object that the plan reads is not there: the plan is out of date, or from another machine."""

    status = grpc.StatusCode.NOT_FOUND


class SourceDenied(SourceFailed):
    """The store refused: the session's credentials, or this process's user, may not read it."""

    status = grpc.StatusCode.PERMISSION_DENIED


class SourceCorrupt(SourceFailed):
    """A file cannot be read as what the plan says it is: it is damaged, or another since the plan was made."""

    status = grpc.StatusCode.DATA_LOSS


class ExecutionFailed(WorkerError):
    """DataFusion returned an error while it ran the plan, of none of the kinds above."""


class EnginePanicked(WorkerError):
    """DataFusion panicked, in decoding or in execution. Later requests are not affected."""


class UpstreamFailed(WorkerError):
    """A worker that this one reads from answered with an error, which is passed on as it is."""

    def __init__(self, text: str, status: grpc.StatusCode = grpc.StatusCode.INTERNAL, details: bytes = b"") -> None:
        """
        Args:
            text: what the upstream said.
            status: the upstream's.
            details: the upstream's protobuf of the error, where it sent one.
        """
        super().__init__(text)
        self.status = status
        self.details = details


class QueryEnded(WorkerError):
    """The coordinator has ended the query, while somebody was reading its tasks."""

    status = grpc.StatusCode.CANCELLED


class PlanNotSet(WorkerError):
    """A task was asked for whose plan no coordinator has sent within some seconds."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class SessionBuilderFailed(WorkerError):
    """The session builder or the plan policy raised, or there is no session. The cause is for the log alone."""


class Unauthenticated(WorkerError):
    """Raise it from a session builder when the request does not say who asks."""

    status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(WorkerError):
    """Raise it from a session builder when who asks may not, and from a plan policy when the plan may not."""

    status = grpc.StatusCode.PERMISSION_DENIED


class NotFound(WorkerError):
    """Raise it from a session builder when what the request names does not exist."""

    status = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(WorkerError):
    """Raise it from a session builder when the request cannot be served in the present state."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class QuotaExceeded(WorkerError):
    """Raise it from a session builder when who asks has used up what they may use."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(WorkerError):
    """Raise it from a session builder when something it needs is down; clients may retry."""

    status = grpc.StatusCode.UNAVAILABLE

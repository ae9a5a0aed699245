"""The ObservabilityService servicer, which the console of Distributed DataFusion asks: one handler an RPC."""

from typing import Any

import grpc

from worker.cluster.service import ClusterServicer
from worker.execution.watchdog import resident_bytes
from worker.handlers import adding
from worker.proto import observability_pb2, observability_pb2_grpc
from worker.requests import Request
from worker.servicer import Context

SERVICE: str = observability_pb2.DESCRIPTOR.services_by_name["ObservabilityService"].full_name


class ObservabilityServicer(ClusterServicer, observability_pb2_grpc.ObservabilityServiceServicer):
    """A worker that tells what it does.

    The session builder says who may ask, as for any other request, and of what runs, each principal sees its own:
    whoever knows the key of a task may read its output (see ``ClusterServicer.ExecuteTask``).
    """

    async def Ping(self, request: Any, context: Context) -> observability_pb2.PingResponse:
        """An answer, to anybody."""
        async with self._answering(context, "Ping"):
            return observability_pb2.PingResponse(value=1)
        return observability_pb2.PingResponse()  # not sent

    async def GetTaskProgress(self, request: Any, context: Context) -> observability_pb2.GetTaskProgressResponse:
        """The tasks of the caller's principal that run, each with its rows so far, and what the whole process takes."""
        async with self._answering(context, "GetTaskProgress") as answered:
            principal = await self._admit(answered, context)
            return observability_pb2.GetTaskProgressResponse(
                tasks=[
                    observability_pb2.TaskProgress(
                        task_key=observability_pb2.TaskKey(
                            query_id=task.orders.key.query_id.bytes,
                            stage_id=task.orders.key.stage_id,
                            task_number=task.orders.key.task_number,
                        ),
                        status=observability_pb2.TASK_STATUS_RUNNING,
                        output_rows=task.output_rows(),
                    )
                    for task in self._cluster_tasks.of(principal)
                ],
                worker_metrics=observability_pb2.WorkerMetrics(
                    rss_bytes=resident_bytes(), cpu_usage_percent=self._cpu_usage.percent()
                ),
            )
        return observability_pb2.GetTaskProgressResponse()  # not sent: the status says what was wrong

    async def GetClusterWorkers(self, request: Any, context: Context) -> observability_pb2.GetClusterWorkersResponse:
        """The URLs of the setting ``cluster_workers``; without it, those that the principal's plans named of late."""
        async with self._answering(context, "GetClusterWorkers") as answered:
            principal = await self._admit(answered, context)
            urls = self._settings.cluster_workers or self._members.of(principal)
            return observability_pb2.GetClusterWorkersResponse(worker_urls=urls)
        return observability_pb2.GetClusterWorkersResponse()  # not sent either

    async def _admit(self, answered: Request, context: Context) -> str:
        """The principal of who asks."""
        query = self._query_context(answered, context, task_index=0, task_count=0, stage_key=None)
        await self._session_builder.admit(query)
        return query.principal


def add_ObservabilityServiceServicer_to_server(
    servicer: observability_pb2_grpc.ObservabilityServiceServicer, server: grpc.aio.Server
) -> None:
    """Adds a servicer to a server, like the generated function of this name."""
    observability_pb2_grpc.add_ObservabilityServiceServicer_to_server(servicer, adding(server, SERVICE, {}))

"""grpc.health.v1.Health. Owns the serving status of each name and who watches it.

Our own, because grpcio-health-checking's writes to its watchers while it holds a lock: one watcher that reads nothing
would hold up everybody's status. Here each watcher has an event and a place of its own and takes a snapshot when it is
ready to write. Every name starts as NOT_SERVING. Its codes are the health protocol's, not this service's: they carry no
ErrorInfo.
"""

from __future__ import annotations

import asyncio
from typing import TypeAlias

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

PROCESS = ""
LIVENESS = "quire.live"
READINESS = "quire.v1.InferenceService"

Context: TypeAlias = "grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]"

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """Tells who asks, and those who watch, whether a name is served."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = dict.fromkeys((PROCESS, LIVENESS, READINESS), NOT_SERVING)
        self._watchers: set[asyncio.Event] = set()
        self._is_closed = False

    def set(self, name: str, is_serving: bool) -> None:
        """Changes a name's status and wakes the watchers."""
        self._statuses[name] = SERVING if is_serving else NOT_SERVING
        self._wake()

    def close(self) -> None:
        """Ends all watches, so that a server can stop."""
        self._is_closed = True
        self._wake()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The status of a name; NOT_FOUND for one that is not known."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=status)

    # The stubs for mypy do not know List yet.
    async def List(self, request: Message, context: grpc.aio.ServicerContext[Message, Message]) -> Message:
        """The status of every name."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined, no-any-return]

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """The status of a name now and whenever it changes; SERVICE_UNKNOWN for one that is not known."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        told = None
        try:
            while not self._is_closed:
                changed.clear()
                status = self._statuses.get(request.service, SERVICE_UNKNOWN)
                if status != told:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                else:
                    await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()

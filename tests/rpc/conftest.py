"""A real front end on a loopback port over a fake engine, and real clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from service.config import BUILT_IN_MODEL, Settings
from service.pb.quire.v1 import inference_pb2_grpc
from service.server import FrontEnd
from service.text.tokenizer import Tokenizer
from tests.rpc.fake_engine import FakeEngine
from tests.rpc.leaks import Failure

TEXT = "Hello world, this is a list of words."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(BUILT_IN_MODEL)


class RecordingStub:
    """The generated stub; every call it makes is remembered, to be checked at the end."""

    def __init__(self, stub: Any, calls: list[Any]) -> None:
        self._stub = stub
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            self._calls.append(made)
            return made

        return call


class Served:
    """A front end that serves, and a client of it."""

    def __init__(self, front_end: FrontEnd, engine: FakeEngine, channel: grpc.aio.Channel) -> None:
        self.front_end = front_end
        self.engine = engine
        self.channel = channel
        self.calls: list[Any] = []
        self.stub = RecordingStub(inference_pb2_grpc.InferenceServiceStub(channel), self.calls)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits for something that must come; the test's own timeout ends it otherwise."""
        while not holds():  # noqa: ASYNC110 (what is waited for is another task's plain state)
            await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """Waits until no caller holds anything and the engine has nothing left."""
        await self.until(lambda: not self.front_end.generations.num_open and not self.engine.sequences)


async def failure_of(call: Awaitable[Any]) -> Failure:
    """The failure of a unary call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    return Failure(error.code(), error.details() or "", dict(error.trailing_metadata() or ()))


async def rest_of(call: Any) -> list[Any]:
    """What a stream still gives; may follow single reads."""
    messages: list[Any] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def failure_of_stream(call: Any) -> Failure:
    """The failure of a stream, once it was read to its end."""
    with pytest.raises(grpc.aio.AioRpcError):
        await rest_of(call)
    return await Failure.of(call)


@pytest.fixture
async def serve(tokenizer: Tokenizer) -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """Starts front ends; at the end every status that any call got is checked, and everything is closed."""
    running: list[Served] = []

    async def start(
        engine: FakeEngine | None = None, channel_options: list[tuple[str, Any]] | None = None, **settings: Any
    ) -> Served:
        engine = engine or FakeEngine(script=tokenizer.encode(TEXT))
        defaults: dict[str, Any] = {"port": 0, "metrics_port": 0, "lame_duck_seconds": 0.0, "drain_seconds": 5.0}
        front_end = FrontEnd(Settings(**defaults | settings), engine)
        await front_end.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{front_end.port}", options=channel_options)
        served = Served(front_end, engine, channel)
        running.append(served)
        if engine.starts_up:
            await served.until(lambda: front_end.model.is_known)
        return served

    yield start
    for served in running:
        for call in served.calls:
            call.cancel()
            with suppress(asyncio.CancelledError):
                if await call.code() is not grpc.StatusCode.OK:
                    (await Failure.of(call)).check()
        await served.channel.close()
        await served.front_end.stop()

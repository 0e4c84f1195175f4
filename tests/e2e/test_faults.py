"""Ends and deaths: drains, second signals, engines that are killed or hang, supervisors that vanish."""

import asyncio
import os
import signal

import pytest

from service.client.aio import Client
from service.client.errors import QuireClientError
from service.client.types import HealthStatus
from tests.e2e.conftest import Serve
from tests.e2e.server import Server, is_alive, log_lines, wait_until
from tests.e2e.test_load import stream

LONG = {"prompt": [11] * 20, "max_tokens": 900, "temperature": 0.7, "seed": 3, "ignore_eos": True}


async def run_long(client: Client, started: asyncio.Event | None = None) -> tuple[int, ...]:
    tokens: list[int] = []
    async with client.stream(**LONG, return_token_ids=True) as events:  # type: ignore[arg-type]
        async for event in events:
            tokens += getattr(event, "token_ids", ())
            if started is not None:
                started.set()
    return tuple(tokens)


async def test_a_drain_loses_no_stream(serve: Serve) -> None:
    server = serve("--lame-duck-seconds", "0.5")
    async with Client(server.address) as client:
        started = [asyncio.Event() for _ in range(8)]
        running = [asyncio.create_task(run_long(client, event)) for event in started]
        await asyncio.gather(*(event.wait() for event in started))
        server.signal(signal.SIGTERM)
        statuses = []
        while server.process.poll() is None and len(statuses) < 1000:
            statuses.append(await asyncio.to_thread(server.health))
            await asyncio.sleep(0.02)
        answers = await asyncio.gather(*running)
    assert all(len(tokens) == 900 for tokens in answers)
    assert len(set(answers)) == 1
    assert HealthStatus.NOT_SERVING in statuses
    assert server.process.wait(10) == 0


async def test_new_calls_are_refused_while_draining(serve: Serve) -> None:
    server = serve("--lame-duck-seconds", "0")
    async with Client(server.address) as client:
        started = asyncio.Event()
        running = asyncio.create_task(run_long(client, started))
        await started.wait()
        server.signal(signal.SIGTERM)
        wait_until(lambda: server.health() is not HealthStatus.SERVING)
        async with Client(server.address) as other:
            with pytest.raises(QuireClientError) as caught:
                await other.generate("x", max_tokens=1, timeout_seconds=0.5)
        assert caught.value.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        assert len(await running) == 900


async def test_a_second_signal_ends_at_once(serve: Serve) -> None:
    server = serve("--lame-duck-seconds", "60", "--drain-seconds", "60")
    async with Client(server.address) as client:
        started = asyncio.Event()
        running = asyncio.create_task(run_long(client, started))
        await started.wait()
        server.signal(signal.SIGTERM)
        wait_until(lambda: server.health() is HealthStatus.NOT_SERVING)
        server.signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        (end,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(end, tuple) or (isinstance(end, QuireClientError) and end.reason == "SERVER_DRAINING")


async def survive(server: Server, harm: signal.Signals) -> None:
    """Streams go on with the same tokens when the engine is harmed in their midst."""
    async with Client(server.address) as client:
        expected = await run_long(client)
        others = await asyncio.gather(*(stream(client, index) for index in range(8)))
        started = asyncio.Event()
        running = asyncio.create_task(run_long(client, started))
        beside = [asyncio.create_task(stream(client, index)) for index in range(8)]
        await started.wait()
        os.kill(server.pid_of("service.engine.process"), harm)
        assert await asyncio.wait_for(running, 60) == expected
        assert await asyncio.gather(*beside) == others
    wait_until(lambda: server.health() is HealthStatus.SERVING)
    assert server.metric("quire_engine_restarts_total") == 1


async def test_streams_survive_a_killed_engine(serve: Serve) -> None:
    await survive(serve(), signal.SIGKILL)


async def test_streams_survive_a_hung_engine(serve: Serve) -> None:
    await survive(serve("--engine-timeout-seconds", "3"), signal.SIGSTOP)


def test_an_engine_that_keeps_dying_ends_the_server(serve: Serve) -> None:
    server = serve("--max-engine-restarts", "1")
    for _ in range(2):
        wait_until(lambda: server.health() is HealthStatus.SERVING, 60)
        os.kill(server.pid_of("service.engine.process"), signal.SIGKILL)
        wait_until(lambda: server.health() is not HealthStatus.SERVING)
    assert server.process.wait(30) == 1
    assert any("giving up" in str(line.get("message")) for line in log_lines(server))


def test_children_end_with_their_supervisor(serve: Serve) -> None:
    server = serve()
    children = [server.pid_of("service.engine.process"), server.pid_of("service.server")]
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(map(is_alive, children)))

"""Start, drain and stop: in which order, and what callers see of it."""

import asyncio
import os
import socket

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from service.config import Settings
from service.errors import StartupError
from service.heartbeat import Heartbeat
from service.pb.quire.v1 import inference_pb2 as pb
from service.server import FrontEnd
from tests.rpc.conftest import failure_of, failure_of_stream, rest_of
from tests.rpc.fake_engine import FakeEngine
from tests.rpc.test_calls import request, stream_request
from tests.rpc.test_health import READINESS, status


async def test_drain_tells_balancers_then_refuses_then_lets_finish(serve):
    served = await serve(FakeEngine(pause_at=1), lame_duck_seconds=60.0)
    running = served.stub.StreamGenerate(stream_request(2))
    await running.read()
    draining = asyncio.create_task(served.front_end.drain())
    await served.until(lambda: served.front_end._health._statuses[READINESS] == HealthCheckResponse.NOT_SERVING)
    assert await status(served, READINESS) == HealthCheckResponse.NOT_SERVING
    assert await status(served, "quire.live") == HealthCheckResponse.SERVING
    lame_duck = served.stub.StreamGenerate(stream_request(2))  # a lame duck still serves
    await lame_duck.read()
    served.front_end._skipping.set()
    served.engine.resume()
    assert (await rest_of(running))[-1].WhichOneof("event") == "finished"
    await draining
    failure = await failure_of(served.stub.Generate(request(1)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
    assert failure.pushback_ms == 1000


async def test_drain_waits_for_what_runs(serve):
    served = await serve(FakeEngine(pause_at=1), drain_seconds=60.0)
    running = served.stub.StreamGenerate(stream_request(2))
    await running.read()
    draining = asyncio.create_task(served.front_end.drain())
    assert (await failure_of_when_refused(served)).reason == "SERVER_DRAINING"
    assert not draining.done()
    served.engine.resume()
    assert (await rest_of(running))[-1].WhichOneof("event") == "finished"
    await draining


async def failure_of_when_refused(served):
    """The refusal, once the front end refuses."""
    await served.until(lambda: not served.front_end._admission.is_accepting)
    return await failure_of(served.stub.Generate(request(1)))


async def test_what_does_not_finish_within_the_budget_is_ended(serve):
    served = await serve(FakeEngine(pause_at=1), drain_seconds=0.05)
    stream = served.stub.StreamGenerate(stream_request(5))
    unary = served.stub.Generate(request(5))
    await stream.read()
    await served.until(lambda: len(served.engine.sequences) == 2)
    await served.front_end.drain()
    assert (await failure_of_stream(stream)).reason == "SERVER_DRAINING"
    assert (await failure_of(unary)).reason == "SERVER_DRAINING"
    await served.idle()
    assert len(served.engine.cancelled) == 2


async def test_a_second_request_to_stop_skips_ahead(serve):
    served = await serve(FakeEngine(pause_at=1), lame_duck_seconds=60.0, drain_seconds=60.0)
    stream = served.stub.StreamGenerate(stream_request(5))
    await stream.read()
    serving = asyncio.create_task(served.front_end.serve())
    served.front_end.request_stop()
    await serving
    served.front_end.request_stop()
    await served.front_end.drain()
    assert (await failure_of_stream(stream)).reason == "SERVER_DRAINING"


async def test_an_engine_that_returns_while_draining_does_not_reopen(serve):
    served = await serve()
    served.front_end.request_stop()
    await served.front_end.drain()
    served.engine.up()
    assert await status(served, READINESS) == HealthCheckResponse.NOT_SERVING


async def test_stop_ends_watches_and_closes_both_ports(serve):
    served = await serve()
    watch = served.health.Watch(HealthCheckRequest(service=READINESS))
    await watch.read()
    front_end = served.front_end
    await front_end.stop()
    assert await watch.code() is grpc.StatusCode.OK
    for port in (front_end.port, front_end.metrics_port):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)


async def test_a_failed_engine_client_ends_the_front_end(serve, monkeypatch):
    async def fails(self: FakeEngine) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(FakeEngine, "run", fails)
    front_end = FrontEnd(Settings(port=0, metrics_port=0), FakeEngine())
    with pytest.raises(RuntimeError, match="a bug"):
        await front_end.run(asyncio.Event().wait())
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", front_end.port), timeout=5)


@pytest.mark.parametrize("busy", ["port", "metrics_port"])
async def test_a_busy_port_is_a_users_mistake(serve, busy):
    served = await serve()
    taken = served.front_end.port if busy == "port" else served.front_end.metrics_port
    front_end = FrontEnd(Settings(**{"port": 0, "metrics_port": 0, busy: taken}), FakeEngine())
    with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use"):
        await front_end.run(asyncio.Event().wait())


async def test_a_model_without_a_tokenizer_is_a_users_mistake(tmp_path):
    with pytest.raises(StartupError):
        FrontEnd(Settings(model=tmp_path), FakeEngine())


async def test_the_heartbeat_beats_and_notices_that_it_is_alone():
    reading, writing = os.pipe()
    lags: asyncio.Queue[float] = asyncio.Queue()
    orphaned = asyncio.Event()
    heartbeat = Heartbeat(writing, on_lag=lags.put_nowait, on_orphaned=orphaned.set)
    beating = asyncio.create_task(heartbeat.run())
    heartbeat.ready()
    assert await lags.get() >= 0
    assert set(os.read(reading, 100)) == set(b"R.")
    os.close(reading)
    await orphaned.wait()
    await beating
    os.close(writing)


async def test_a_full_pipe_does_not_stop_the_loop():
    reading, writing = os.pipe()
    heartbeat = Heartbeat(writing, on_lag=lambda _: None, on_orphaned=lambda: None)
    for _ in range(70_000):  # a pipe holds 64 KiB
        heartbeat.ready()
    os.close(reading)
    os.close(writing)


async def test_generations_in_the_queue_are_ended_too(serve):
    served = await serve(FakeEngine(max_started=0), drain_seconds=0.0)
    waiting = served.stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(text="a")))
    await served.until(lambda: len(served.engine.sequences) == 1)
    await served.front_end.drain()
    assert (await failure_of(waiting)).reason == "SERVER_DRAINING"

"""grpc.health.v1, watched by clients that behave and by one that does not; reflection."""

import asyncio

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.rpc.health import Health
from tests.rpc.conftest import failure_of
from tests.rpc.fake_engine import FakeEngine

READINESS = "quire.v1.InferenceService"
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


async def status(served, name: str) -> int:
    return (await served.health.Check(HealthCheckRequest(service=name))).status


async def test_the_process_serves_before_the_engine_does(serve):
    served = await serve(FakeEngine(starts_up=False))
    assert [await status(served, name) for name in ("", "quire.live", READINESS)] == [SERVING, SERVING, NOT_SERVING]
    served.engine.up()
    assert await status(served, READINESS) == SERVING
    served.engine.die(is_recoverable=True)
    assert [await status(served, name) for name in ("", "quire.live", READINESS)] == [SERVING, SERVING, NOT_SERVING]
    listed = (await served.health.List(HealthListRequest())).statuses
    assert {name: entry.status for name, entry in listed.items()} == {
        "": SERVING,
        "quire.live": SERVING,
        READINESS: NOT_SERVING,
    }


async def test_everything_begins_as_not_serving():
    answer = await Health().Check(HealthCheckRequest(service=""), None)
    assert answer.status == NOT_SERVING


async def test_an_unknown_name(serve):
    served = await serve()
    failure = await failure_of(served.health.Check(HealthCheckRequest(service="no such")))
    assert failure.code is grpc.StatusCode.NOT_FOUND
    watch = served.health.Watch(HealthCheckRequest(service="no such"))
    assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_a_watcher_hears_each_change(serve):
    served = await serve(FakeEngine(starts_up=False))
    watch = served.health.Watch(HealthCheckRequest(service=READINESS))
    assert (await watch.read()).status == NOT_SERVING
    served.engine.up()
    assert (await watch.read()).status == SERVING
    served.engine.die(is_recoverable=True)
    assert (await watch.read()).status == NOT_SERVING
    served.front_end._health.close()
    assert await watch.read() is grpc.aio.EOF
    assert await watch.code() is grpc.StatusCode.OK


class StuckContext:
    """A watcher whose window is zero: no write ever returns."""

    def __init__(self) -> None:
        self.is_writing = asyncio.Event()

    async def write(self, _: object) -> None:
        self.is_writing.set()
        await asyncio.Event().wait()


async def test_a_stuck_watcher_holds_up_nobody(serve):
    served = await serve(FakeEngine(starts_up=False))
    stuck = StuckContext()
    writing = asyncio.create_task(served.front_end._health.Watch(HealthCheckRequest(service=READINESS), stuck))
    await stuck.is_writing.wait()
    watch = served.health.Watch(HealthCheckRequest(service=READINESS))
    assert (await watch.read()).status == NOT_SERVING
    served.engine.up()
    assert (await watch.read()).status == SERVING
    assert await status(served, READINESS) == SERVING
    assert not writing.done()
    writing.cancel()
    watch.cancel()
    await served.until(lambda: not served.front_end._health._watchers)


async def listed_services(served) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return {service.name for service in answer.list_services_response.service}


async def test_reflection_lists_the_services_and_describes_them(serve):
    served = await serve()
    assert await listed_services(served) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        READINESS,
    }
    call = reflection_pb2_grpc.ServerReflectionStub(served.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=READINESS))
    assert (await call.read()).file_descriptor_response.file_descriptor_proto
    call.cancel()


async def test_reflection_can_be_off(serve):
    served = await serve(reflection=False)
    call = served.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")()
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED

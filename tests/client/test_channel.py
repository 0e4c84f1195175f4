"""Addresses, and the shipped service config as gRPC understands it: retries, pushback, client-side health checks."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from service.client import aio, blocking
from service.client.channel import target
from service.client.errors import QuireClientError
from service.client.types import HealthStatus
from service.pb.quire.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from tests.client.server import FakeServer, refuse, running, say

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    "address",
    ["localhost:50051", "10.0.0.1:1", "[::1]:65535", "unix:/run/quire.sock", "unix:///run/quire.sock", "dns:///q:5",
     "ipv4:127.0.0.1:1,127.0.0.1:2", "my-host.example:80"],
)  # fmt: skip
def test_addresses(address: str) -> None:
    assert target(address) == address


@pytest.mark.parametrize(
    "address",
    ["", "localhost", ":50051", "localhost:", "localhost:0", "localhost:65536", "localhost:x", "localhost:٣",
     "::1:50051", "http://localhost:50051", "localhost:50051/path", "unix:", "dns:///", "a b:1", "[::1]",
     "localhost:-1"],
)  # fmt: skip
def test_bad_addresses_are_told_in_one_line(address: str) -> None:
    with pytest.raises(ValueError, match=r"^address .*[^\n]$"):
        target(address)


def test_a_unix_socket(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    add_InferenceServiceServicer_to_server(FakeServer(), server)
    address = f"unix:{tmp_path}/s"
    server.add_insecure_port(address)
    server.start()
    with blocking.BlockingClient(address) as client:
        assert client.tokenize("a").token_ids == (97,)  # a server without health checks counts as healthy
    server.stop(None).wait()


@pytest.mark.parametrize("code", [UNAVAILABLE, EXHAUSTED])
def test_a_refusal_before_the_first_token_is_retried(server: FakeServer, code: grpc.StatusCode) -> None:
    server.play(refuse(code, "SERVER_DRAINING"), refuse(code, "QUEUE_FULL", pushback_ms=1), say("fine"))
    with blocking.BlockingClient(server.address) as client:
        assert client.generate("p").text == "fine"
        assert len(server.specs) == 3
        server.play(refuse(code, "QUEUE_FULL"), say("fine"))
        assert len(list(client.stream("p"))) == 3
        assert len(server.specs) == 2


async def test_the_asyncio_client_retries_too(server: FakeServer) -> None:
    server.play(refuse(UNAVAILABLE, "SERVER_DRAINING"), say("fine"))
    async with aio.Client(server.address) as client:
        assert (await client.generate("p")).text == "fine"


def test_nothing_is_retried_after_the_first_token(server: FakeServer) -> None:
    server.play(refuse(UNAVAILABLE, "ENGINE_LOST", texts=["a"], retry_ms=500), say("never"))
    with blocking.BlockingClient(server.address) as client, client.stream("p") as events:
        next(events), next(events)
        with pytest.raises(QuireClientError) as caught:
            next(events)
    assert (caught.value.reason, caught.value.retry_after_seconds) == ("ENGINE_LOST", 0.5)
    assert len(server.specs) == 1


def test_attempts_are_bounded(server: FakeServer) -> None:
    server.play(refuse(EXHAUSTED, "QUEUE_FULL", pushback_ms=1, queueDepth="9"))
    with blocking.BlockingClient(server.address) as client, pytest.raises(QuireClientError) as caught:
        client.generate("p")
    assert len(server.specs) == 4
    assert (caught.value.reason, caught.value.metadata) == ("QUEUE_FULL", {"queueDepth": "9"})
    assert caught.value.retry_after_seconds == 0.001


def test_a_negative_pushback_forbids_a_retry(server: FakeServer) -> None:
    server.play(refuse(EXHAUSTED, "QUEUE_FULL", pushback_ms=-1), say("never"))
    with blocking.BlockingClient(server.address) as client, pytest.raises(QuireClientError) as caught:
        client.generate("p")
    assert (len(server.specs), caught.value.retry_after_seconds) == (1, None)


def test_a_pushback_is_waited_for(server: FakeServer) -> None:
    """A pushback beyond the deadline: the second attempt, which would succeed, is never made."""
    server.play(refuse(EXHAUSTED, "QUEUE_FULL", pushback_ms=60_000), say("too early"))
    with blocking.BlockingClient(server.address) as client, pytest.raises(QuireClientError) as caught:
        client.generate("p", timeout_seconds=1.0)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert len(server.specs) == 1


async def test_a_server_that_does_not_serve_gets_no_calls() -> None:
    """Client-side health checking: calls go where it serves, follow its health, and questions about it still arrive."""
    with running() as first, running() as second:
        first.play(say("first"))
        second.play(say("second"))
        first.health.set(NOT_SERVING)
        async with aio.Client(f"ipv4:127.0.0.1:{first.port},127.0.0.1:{second.port}") as client:
            assert {(await client.generate("p")).text for _ in range(6)} == {"second"}
            first.health.set(SERVING)
            second.health.set(NOT_SERVING)
            await _until(client, "first")
            first.health.set(NOT_SERVING)
            await _until(client, "UNAVAILABLE")
            second.health.set(SERVING)
            await _until(client, "second")


async def test_a_server_that_does_not_serve_answers_questions_about_it(server: FakeServer) -> None:
    server.health.set(NOT_SERVING)
    async with aio.Client(server.address) as client:
        assert await client.health() is HealthStatus.NOT_SERVING
        assert (await client.get_load()).accepting


async def _until(client: aio.Client, wanted: str) -> None:
    """Calls until the answer, or the error's code, is the wanted one."""
    for _ in range(1_000):
        try:
            answer = (await client.generate("p", timeout_seconds=20)).text
        except QuireClientError as error:
            answer = error.code
        if answer == wanted:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"no {wanted} in a thousand calls")

"""Both clients, over real gRPC, against the same script: what they send, what they return, what they raise."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest

from service.client import aio, blocking
from service.client.errors import QuireClientError, Violation
from service.client.types import (
    Delta,
    Finished,
    FinishReason,
    HealthStatus,
    Logprob,
    Message,
    Started,
    Timing,
    TokenLogprobs,
    Usage,
)
from service.pb.quire.v1 import inference_pb2 as pb
from tests.client.server import WAIT_SECONDS, FakeServer, refuse, running, say, say_then_wait

OPTIONS: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 0.5,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {5: -1.0},
    "seed": 2**64 - 1,
    "max_tokens": 10,
    "min_tokens": 0,
    "stop_strings": ["a", "b"],
    "stop_token_ids": [1, 2],
    "ignore_eos": True,
    "include_stop_string": True,
    "return_token_ids": True,
    "top_logprobs": 0,
    "omit_text": True,
    "keep_special_tokens": True,
    "cache_salt": "salt",
    "bypass_cache": True,
    "priority": -3,
    "client_request_id": "me",
}


@pytest.fixture
def client(server: FakeServer) -> Iterator[blocking.BlockingClient]:
    with blocking.BlockingClient(server.address) as client:
        yield client


@pytest.fixture
async def async_client(server: FakeServer) -> AsyncIterator[aio.Client]:
    async with aio.Client(server.address) as client:
        yield client


class Waiting:
    """The asyncio client behind blocking calls, so that one test drives both."""

    def __init__(self, client: aio.Client, runner: asyncio.Runner) -> None:
        self._client, self._runner = client, runner

    def stream(self, *args: Any, **options: Any) -> Any:
        async def collect() -> list[Any]:
            async with self._client.stream(*args, **options) as events:
                return [event async for event in events]

        return self._runner.run(collect())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self._runner.run(getattr(self._client, name)(*args, **options))


@pytest.fixture(params=["blocking", "asyncio"])
def either(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Any]:
    if request.param == "blocking":
        with blocking.BlockingClient(server.address) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        client = Waiting(aio.Client(server.address), runner)
        yield client
        client.close()


def test_every_option_reaches_its_field(server: FakeServer, either: Any) -> None:
    either.generate("prompt", **OPTIONS)
    expected = pb.GenerationSpec(
        model="tiny",
        text="prompt",
        sampling=pb.SamplingParams(
            temperature=0.0,
            top_k=0,
            top_p=0.5,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.5,
            logit_bias=[pb.LogitBias(token_id=5, bias=-1.0)],
            seed=2**64 - 1,
        ),
        stop=pb.StopParams(
            max_tokens=10,
            min_tokens=0,
            stop_strings=["a", "b"],
            stop_token_ids=[1, 2],
            ignore_eos=True,
            include_stop_string=True,
        ),
        output=pb.OutputOptions(return_token_ids=True, top_logprobs=0, omit_text=True, keep_special_tokens=True),
        cache=pb.CacheOptions(salt="salt", bypass=True),
        priority=-3,
        client_request_id="me",
    )
    assert server.specs == [expected]


def test_options_left_out_or_none_are_unset(server: FakeServer, either: Any) -> None:
    either.generate("prompt", **dict.fromkeys(OPTIONS), add_generation_prompt=None)
    assert server.specs == [pb.GenerationSpec(text="prompt")]


def test_prompts_of_every_kind(server: FakeServer, either: Any) -> None:
    either.generate([1, 2, 3])
    messages = [Message("system", "s"), Message("user", "u"), Message("assistant", "a")]
    either.generate(messages, add_generation_prompt=False)
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role=pb.ROLE_SYSTEM, content="s"),
            pb.ChatMessage(role=pb.ROLE_USER, content="u"),
            pb.ChatMessage(role=pb.ROLE_ASSISTANT, content="a"),
        ],
        add_generation_prompt=False,
    )
    assert server.specs == [pb.GenerationSpec(token_ids=pb.TokenIds(ids=[1, 2, 3])), pb.GenerationSpec(chat=chat)]


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ("p", {"seed": -1}, "seed"),
        ("p", {"seed": 2**64}, "seed"),
        ("p", {"top_k": 1.5}, "top_k"),
        ("p", {"temperature": "hot"}, "temperature"),
        ("p", {"stop_strings": "END"}, "stop_strings"),
        ("p", {"logit_bias": {-1: 1.0}}, "logit_bias"),
        ("p", {"add_generation_prompt": True}, "add_generation_prompt"),
        ([-1], {}, "token ids"),
        ([Message("tool", "x")], {}, "role"),  # type: ignore[arg-type]
    ],
)
def test_what_no_field_can_hold_is_named(
    client: blocking.BlockingClient, prompt: Any, options: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        client.generate(prompt, **options)


def test_an_unknown_option_is_a_type_error(client: blocking.BlockingClient) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.stream("p", temprature=1.0)  # type: ignore[call-arg]


def test_a_generation_is_returned_whole(either: Any) -> None:
    generation = either.generate("p")
    assert generation.text == "Hello there"
    assert generation.token_ids == (7, 8)
    assert generation.logprobs == (TokenLogprobs(Logprob(7, -0.5), (Logprob(9, -0.25),)),)
    assert generation.started == Started("g1", "tiny", 3, 1, 42)
    assert generation.finished == Finished(FinishReason.STOP, "\n", Usage(3, 1, 2, 4), Timing(0.5, 1.0, 2.0))


def test_a_stream_gives_its_events_in_order(server: FakeServer, either: Any) -> None:
    server.play(say("a", "b", reason=pb.FINISH_REASON_MAX_TOKENS, stop=None))
    started, *deltas, finished = list(either.stream("p"))
    assert started == Started("g1", "tiny", 3, 1, 42)
    assert deltas == [Delta("a", (), (), 1), Delta("b", (), (), 1)]
    assert (finished.reason, finished.stop_match) == (FinishReason.MAX_TOKENS, None)


def test_other_methods(either: Any) -> None:
    assert either.tokenize("ab").token_ids == (97, 98)
    assert either.tokenize([Message("user", "x")]).rendered_text == "ROLE_USER:x"
    assert either.detokenize([97, 98]) == "ab"
    model = either.get_model()
    assert (model.name, model.eos_token_ids, model.defaults.max_tokens) == ("tiny", (0, 2), None)
    assert model.limits.max_deadline_seconds == 60.0
    assert either.list_models() == [model]
    assert either.get_load().estimated_queue_seconds == 0.25
    assert either.health() is either.health("") is HealthStatus.SERVING
    assert either.health("nobody") is HealthStatus.SERVICE_UNKNOWN


def test_a_timeout_is_the_calls_deadline(server: FakeServer, either: Any) -> None:
    server.deadlines.clear()
    either.generate("p", timeout_seconds=50.0)
    assert server.deadlines[0] is not None
    assert 0 < server.deadlines[0] <= 50.0
    server.play(say_then_wait(server.cancelled, "a"))
    with pytest.raises(QuireClientError) as caught:
        list(either.stream("p", timeout_seconds=0.2))
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert server.cancelled.wait(WAIT_SECONDS)


def test_an_error_carries_what_the_server_told(server: FakeServer, either: Any) -> None:
    violations = [("spec.sampling.top_p", "must be in (0, 1]"), ("spec.stop.max_tokens", "must be at least 1")]
    script = refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", violations=violations, limit="64")
    for call in (either.generate, lambda prompt: list(either.stream(prompt))):
        server.play(script)
        with pytest.raises(QuireClientError) as caught:
            call("p")
        error = caught.value
        assert (error.code, error.reason, error.message) == ("INVALID_ARGUMENT", "INVALID_FIELD", "refused")
        assert error.violations == tuple(Violation(*violation) for violation in violations)
        assert error.metadata == {"limit": "64"}
        assert error.retry_after_seconds is None
        assert "top_p: must be in (0, 1]" in str(error)
        assert len(server.specs) == 1, "a request that cannot succeed is not sent again"


def test_an_error_of_another_server_is_told_by_its_code(server: FakeServer, client: blocking.BlockingClient) -> None:
    def script(spec: Any, context: grpc.ServicerContext) -> Iterator[pb.StreamGenerateResponse]:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
        yield from ()

    server.play(script)
    with pytest.raises(QuireClientError) as caught:
        client.generate("p")
    assert (caught.value.code, caught.value.reason, caught.value.message) == ("PERMISSION_DENIED", None, "no")


@pytest.mark.parametrize("numbers", [(1,), (0, 2), (0, 0), (0,)])
def test_a_stream_that_is_not_whole_is_an_error(server: FakeServer, either: Any, numbers: tuple[int, ...]) -> None:
    def script(spec: Any, context: grpc.ServicerContext) -> Iterator[pb.StreamGenerateResponse]:
        for number in numbers:
            yield pb.StreamGenerateResponse(sequence_number=number, delta=pb.Delta(text="x"))

    server.play(script)
    with pytest.raises(QuireClientError, match="the stream"):
        list(either.stream("p"))


def test_an_unreachable_server_is_unavailable() -> None:
    with running() as server:
        address = server.address
    with blocking.BlockingClient(address) as client, pytest.raises(QuireClientError) as caught:
        client.generate("p")
    assert caught.value.code == "UNAVAILABLE"
    assert caught.value.reason is None


# Cancelling: the server learns of it however the consumer leaves.


def test_leaving_a_blocking_stream_cancels(server: FakeServer, client: blocking.BlockingClient) -> None:
    server.play(say_then_wait(server.cancelled, "a"))
    with client.stream("p") as events:
        for event in events:
            if isinstance(event, Delta):
                break
    assert server.cancelled.wait(WAIT_SECONDS)
    assert list(events) == []


def test_dropping_a_blocking_stream_cancels(server: FakeServer, client: blocking.BlockingClient) -> None:
    server.play(say_then_wait(server.cancelled, "a"))
    for event in client.stream("p"):
        if isinstance(event, Delta):
            break
    gc.collect()
    assert server.cancelled.wait(WAIT_SECONDS)


async def _cancelled(server: FakeServer) -> bool:
    return await asyncio.to_thread(server.cancelled.wait, WAIT_SECONDS)


async def test_leaving_an_asyncio_stream_cancels(server: FakeServer, async_client: aio.Client) -> None:
    server.play(say_then_wait(server.cancelled, "a"))
    async with async_client.stream("p") as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    assert await _cancelled(server)
    assert [event async for event in events] == []


async def test_dropping_an_asyncio_stream_cancels(server: FakeServer, async_client: aio.Client) -> None:
    server.play(say_then_wait(server.cancelled, "a"))
    async for event in async_client.stream("p"):
        if isinstance(event, Delta):
            break
    gc.collect()
    assert await _cancelled(server)


async def test_an_exception_in_the_consumer_cancels(server: FakeServer, async_client: aio.Client) -> None:
    server.play(say_then_wait(server.cancelled, "a"))

    async def consume() -> None:
        async with async_client.stream("p") as events:
            async for _ in events:
                raise KeyError

    with pytest.raises(KeyError):
        await consume()
    assert await _cancelled(server)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_cancelling_the_task_cancels(server: FakeServer, async_client: aio.Client, method: str) -> None:
    server.play(say_then_wait(server.cancelled, "a"))

    async def consume() -> None:
        if method == "generate":
            await async_client.generate("p")
        async for _ in async_client.stream("p"):
            pass

    task = asyncio.create_task(consume())
    assert await asyncio.to_thread(server.called.wait, WAIT_SECONDS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _cancelled(server)

"""Calls that do not go well: cancels in every state, deadlines, full queues, slow readers, lost engines, bugs."""

import asyncio
import time

import grpc
import pytest

from service import generation
from service.errors import ReaderStalled
from service.pb.quire.v1 import inference_pb2 as pb
from service.rpc.inference import InferenceServicer
from tests.rpc.conftest import TEXT, Served, failure_of, failure_of_stream, rest_of
from tests.rpc.fake_engine import FakeEngine
from tests.rpc.test_generate import spec


def stream_request(*args: object, **parts: object) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(spec=spec(*args, **parts))


def request(*args: object, **parts: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(spec=spec(*args, **parts))


async def assert_freed(served: Served) -> None:
    """The engine was told to end everything it was given, once each, and nobody holds anything."""
    await served.idle()
    assert sorted(served.engine.cancelled) == [submit.id for submit in served.engine.submitted]
    load = await served.stub.GetLoad(pb.GetLoadRequest())
    assert (load.running_requests, load.waiting_requests, load.waiting_tokens) == (0, 0, 0)


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
@pytest.mark.parametrize("state", ["queued", "prefilling", "decoding"])
async def test_a_cancel_frees_in_every_state(serve, method, state):
    engine = FakeEngine(max_started=0 if state == "queued" else None, pause_at=0 if state == "prefilling" else 3)
    served = await serve(engine)
    call = getattr(served.stub, method)(request(50) if method == "Generate" else stream_request(50))
    await served.until(lambda: bool(engine.sequences))
    await served.until(
        lambda: {
            "queued": lambda s: not s.is_started,
            "prefilling": lambda s: s.is_started,
            "decoding": lambda s: s.num_tokens == 3,
        }[state](next(iter(engine.sequences.values())))
    )
    call.cancel()
    await assert_freed(served)


async def test_a_cancel_while_the_engine_is_down_frees(serve):
    served = await serve(FakeEngine(pause_at=1))
    call = served.stub.StreamGenerate(stream_request(5))
    await call.read()
    served.engine.die(is_recoverable=True)
    call.cancel()
    await assert_freed(served)


async def test_a_cancel_after_the_end_does_nothing(serve):
    served = await serve()
    call = served.stub.StreamGenerate(stream_request(2))
    assert len(await rest_of(call)) >= 3
    call.cancel()
    await served.idle()
    assert served.engine.cancelled == []


async def test_a_reader_that_leaves_a_connection_frees(serve):
    served = await serve(FakeEngine(pause_at=1))
    call = served.stub.StreamGenerate(stream_request(5))
    await call.read()
    await served.channel.close()
    await served.until(lambda: not served.front_end.generations.num_open and not served.engine.sequences)
    assert len(served.engine.cancelled) == 1


@pytest.mark.parametrize("pause_at", [0, 2])
async def test_the_callers_deadline_ends_the_sequence(serve, pause_at):
    served = await serve(FakeEngine(pause_at=pause_at))
    failure = await failure_of(served.stub.Generate(request(5), timeout=0.3))
    assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_freed(served)
    limits = served.engine.submitted[0].limits
    assert limits.deadline - limits.arrival == pytest.approx(0.3, abs=0.1)  # gRPC rounds it on the wire


async def test_the_servers_default_deadline_is_told_with_what_was_generated(serve):
    served = await serve(FakeEngine(pause_at=2), default_deadline_seconds=0.2)
    failure = await failure_of(served.stub.Generate(request(5)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert failure.metadata == {"generatedTokens": "2"}
    await assert_freed(served)


async def test_a_stream_gives_what_it_has_before_its_deadline_status(serve):
    served = await serve(FakeEngine(pause_at=2), default_deadline_seconds=0.2)
    call = served.stub.StreamGenerate(stream_request(5))
    kinds = [(await call.read()).WhichOneof("event") for _ in range(2)]
    assert kinds == ["started", "delta"]
    assert (await failure_of_stream(call)).metadata == {"generatedTokens": "2"}


async def test_a_long_deadline_is_shortened(serve):
    served = await serve(max_deadline_seconds=5.0, default_deadline_seconds=1.0)
    await served.stub.Generate(request(1), timeout=1e6)
    limits = served.engine.submitted[0].limits
    assert limits.deadline - limits.arrival == pytest.approx(5.0)


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(serve):
    served = await serve(FakeEngine(max_started=1, pause_at=0), max_num_seqs=1, max_waiting_requests=2)
    held = [served.stub.StreamGenerate(stream_request(1)) for _ in range(3)]
    await served.until(lambda: len(served.engine.sequences) == 3)
    await served.until(lambda: any(s.is_started for s in served.engine.sequences.values()))
    failure = await failure_of(served.stub.Generate(request(1)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert failure.metadata == {"queueDepth": "2"}
    assert failure.pushback_ms == 1000
    served.engine.resume()
    for call in held:
        assert await rest_of(call)
    assert (await served.stub.Generate(request(1))).output.num_tokens == 1


async def test_waiting_tokens_are_bounded_too(serve):
    served = await serve(FakeEngine(max_started=0), max_waiting_tokens=30)
    served.stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(token_ids=pb.TokenIds(ids=[1] * 25))))
    await served.until(lambda: len(served.engine.sequences) == 1)
    load = await served.stub.GetLoad(pb.GetLoadRequest())
    assert (load.waiting_requests, load.waiting_tokens) == (1, 25)
    made = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[1] * 6))
    assert (await failure_of(served.stub.Generate(pb.GenerateRequest(spec=made)))).reason == "QUEUE_FULL"


async def test_a_stream_that_is_not_read_ends_at_the_stall_limit(serve):
    # A small window, or the transport takes megabytes before a write waits.
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    served = await serve(channel_options=options, reader_stall_seconds=0.3)
    made = pb.StreamGenerateRequest(spec=pb.GenerationSpec(text="a"))
    made.spec.output.top_logprobs = 20
    call = served.stub.StreamGenerate(made)
    await served.until(lambda: bool(served.engine.submitted))
    await served.idle()
    failure = await failure_of_stream(call)
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "READER_STALLED")


async def test_a_stalled_reader_that_leaves_is_no_bug(serve, caplog):
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    served = await serve(channel_options=options, reader_stall_seconds=0.3)
    made = pb.StreamGenerateRequest(spec=pb.GenerationSpec(text="a"))
    made.spec.output.top_logprobs = 20
    before = len(asyncio.all_tasks())
    call = served.stub.StreamGenerate(made)
    await served.until(lambda: bool(served.engine.submitted))
    await served.idle()
    call.cancel()
    await served.until(lambda: len(asyncio.all_tasks()) <= before)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


class ParkedContext:
    """A servicer context whose writes wait until they are let through."""

    def __init__(self) -> None:
        self.written: list[pb.StreamGenerateResponse] = []
        self.gate = asyncio.Semaphore(0)

    def time_remaining(self) -> None:
        return None

    async def write(self, message: pb.StreamGenerateResponse) -> None:
        await self.gate.acquire()
        self.written.append(message)


async def test_deltas_of_a_slow_reader_are_merged_and_never_dropped(serve, tokenizer):
    served = await serve()
    num_tokens = len(tokenizer.encode(TEXT)) * 5
    context = ParkedContext()
    servicer: InferenceServicer = served.front_end._servicer()
    writing = asyncio.create_task(servicer.StreamGenerate(stream_request(num_tokens), context))
    await served.until(lambda: bool(served.engine.submitted) and not served.engine.sequences)
    for _ in range(4):
        context.gate.release()
    await writing
    kinds = [m.WhichOneof("event") for m in context.written]
    assert kinds == ["started", "delta", "delta", "finished"]
    assert [m.delta.num_tokens for m in context.written[1:3]] == [1, num_tokens - 1]
    assert "".join(m.delta.text for m in context.written) == TEXT * 5


async def test_tokens_that_follow_a_delta_closely_leave_together(serve, monkeypatch):
    monkeypatch.setattr(generation, "DELTA_SECONDS", 0.2)
    served = await serve(FakeEngine(pause_at=6))
    call = served.stub.StreamGenerate(stream_request(9))
    assert (await call.read()).HasField("started")
    began = time.monotonic()
    assert (await call.read()).delta.num_tokens == 1
    assert (await call.read()).delta.num_tokens == 5
    assert time.monotonic() - began >= 0.1


async def test_a_delta_that_is_due_soon_waits_for_the_tokens_that_come_then(serve, monkeypatch):
    monkeypatch.setattr(generation, "DELTA_SECONDS", 0.2)
    monkeypatch.setattr(generation, "DELTA_GRACE_SECONDS", 60.0)
    served = await serve(FakeEngine(pause_at=6))
    call = served.stub.StreamGenerate(stream_request(9))
    assert (await call.read()).HasField("started")
    assert (await call.read()).delta.num_tokens == 1
    await asyncio.sleep(0.25)
    served.engine.resume(pause_at=7)
    assert (await call.read()).delta.num_tokens == 6


async def test_neither_the_first_token_nor_the_end_waits(serve, monkeypatch):
    monkeypatch.setattr(generation, "DELTA_SECONDS", 60.0)
    served = await serve(FakeEngine(pause_at=6))
    call = served.stub.StreamGenerate(stream_request(9))
    assert (await call.read()).HasField("started")
    assert (await call.read()).delta.num_tokens == 1
    served.engine.resume()
    assert (await call.read()).delta.num_tokens == 8
    assert (await call.read()).HasField("finished")


@pytest.mark.parametrize(
    ("num_open", "seconds"), [(1, 0.04), (4, 0.04), (8, 0.08), (10, 0.1), (20, 0.1), (24, 0.12), (5000, 0.15)]
)
def test_among_many_requests_a_stream_gets_fewer_deltas(num_open, seconds):
    assert generation.delta_seconds(num_open) == pytest.approx(seconds)


async def test_a_token_that_follows_a_delta_late_does_not_wait(serve, monkeypatch):
    served = await serve(FakeEngine(pause_at=1))
    call = served.stub.StreamGenerate(stream_request(9))
    assert [(await call.read()).WhichOneof("event") for _ in range(2)] == ["started", "delta"]
    await asyncio.sleep(2 * generation.DELTA_SECONDS)
    monkeypatch.setattr(generation, "DELTA_SECONDS", 60.0)
    served.engine.resume(pause_at=2)
    assert (await call.read()).delta.num_tokens == 1


async def test_a_failure_does_not_wait(serve, monkeypatch):
    monkeypatch.setattr(generation, "DELTA_SECONDS", 60.0)
    served = await serve(FakeEngine(pause_at=3))
    call = served.stub.StreamGenerate(stream_request(9))
    assert [(await call.read()).WhichOneof("event") for _ in range(2)] == ["started", "delta"]
    await served.until(lambda: all(one.num_tokens == 3 for one in served.engine.sequences.values()))
    served.engine.die(is_recoverable=False)
    assert (await call.read()).delta.num_tokens == 2
    assert (await failure_of_stream(call)).reason == "ENGINE_LOST"


async def test_the_stall_limit_counts_from_the_beginning_of_a_write(serve):
    stall_seconds = 0.4
    served = await serve(reader_stall_seconds=stall_seconds)
    context = ParkedContext()
    writing = asyncio.create_task(served.front_end._servicer().StreamGenerate(stream_request(500), context))
    await served.until(lambda: bool(served.engine.submitted))
    for _ in range(2):  # Started and the first Delta, each slow, but not too slow
        await asyncio.sleep(0.7 * stall_seconds)
        context.gate.release()
    await served.until(lambda: len(context.written) == 2)
    parked_at = time.monotonic()
    with pytest.raises(ReaderStalled):
        await writing
    assert 0.9 * stall_seconds < time.monotonic() - parked_at < 5 * stall_seconds
    await served.idle()


class BrokenContext(ParkedContext):
    """A context whose connection broke."""

    async def write(self, message: pb.StreamGenerateResponse) -> None:
        raise grpc.aio.InternalError("the connection is gone")


async def test_a_connection_that_breaks_under_a_write_is_a_cancel(serve, caplog):
    caplog.set_level("INFO")
    served = await serve()
    with pytest.raises(grpc.aio.InternalError):
        await served.front_end._servicer().StreamGenerate(stream_request(500), BrokenContext())
    await assert_freed(served)
    (ended,) = [r.__dict__["fields"] for r in caplog.records if r.getMessage() == "request ended"]
    assert (ended["outcome"], ended["code"]) == ("cancelled", "CANCELLED")


async def test_a_lost_engine_that_comes_back_is_invisible(serve):
    served = await serve(FakeEngine(script=[60, 61], pause_at=1))
    call = served.stub.StreamGenerate(stream_request(3))
    await call.read()
    served.engine.die(is_recoverable=True)
    waiting = served.stub.Generate(request(1))  # accepted: it waits for the next engine
    await served.until(lambda: len(served.engine.sequences) == 2)
    served.engine.resume()
    served.engine.up()
    assert await sum_tokens(call) == 3
    assert (await waiting).output.num_tokens == 1


async def sum_tokens(call) -> int:
    return sum(m.delta.num_tokens for m in await rest_of(call))


async def test_a_lost_engine_that_does_not_is_told(serve):
    served = await serve(FakeEngine(pause_at=2))
    call = served.stub.StreamGenerate(stream_request(5))
    await call.read()
    await served.until(lambda: next(iter(served.engine.sequences.values())).num_tokens == 2)
    served.engine.die(is_recoverable=False)
    failure = await failure_of_stream(call)
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST")
    assert failure.metadata == {"generatedTokens": "2"}
    assert failure.pushback_ms is not None


async def test_before_the_first_engine_everything_is_starting(serve):
    served = await serve(FakeEngine(starts_up=False))
    for call in (
        served.stub.Generate(request(1)),
        served.stub.GetModel(pb.GetModelRequest()),
        served.stub.Detokenize(pb.DetokenizeRequest()),
    ):
        failure = await failure_of(call)
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STARTING")
        assert failure.pushback_ms == 1000
    load = await served.stub.GetLoad(pb.GetLoadRequest())
    assert (load.accepting, load.total_blocks) == (False, 0)
    assert (await served.stub.Tokenize(pb.TokenizeRequest(text="a"))).token_ids  # needs no engine


@pytest.mark.parametrize("error", [ValueError("secret /etc/passwd 10.0.0.1"), asyncio.CancelledError()])
async def test_a_bug_is_internal_with_an_id_that_names_a_log_line(serve, monkeypatch, caplog, error):
    served = await serve()

    async def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("service.rpc.convert.Converter.generation", fails)
    for call in (served.stub.Generate(request(1)), served.stub.StreamGenerate(stream_request(1))):
        failure = await failure_of_stream(call) if hasattr(call, "read") else await failure_of(call)
        assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "secret" not in str(failure.status)
        logged = [
            r for r in caplog.records if r.__dict__.get("fields", {}).get("error_id") == failure.metadata["errorId"]
        ]
        assert len(logged) == 1
        assert logged[0].exc_info is not None


async def test_a_bug_in_handling_a_token_is_this_generations_alone(serve, monkeypatch):
    served = await serve(FakeEngine(script=[60, 61, 62], pause_at=1))
    bad = served.stub.StreamGenerate(stream_request(3))
    await bad.read()
    good = served.stub.StreamGenerate(stream_request(3))
    await good.read()
    first = served.engine.sequences[served.engine.submitted[0].id].listener
    monkeypatch.setattr(first._text, "push", None)
    served.engine.resume()
    failure = await failure_of_stream(bad)
    assert failure.reason == "INTERNAL"
    assert await sum_tokens(good) == 3
    await served.until(lambda: served.engine.cancelled == [first.sequence_id])


async def test_unknown_methods_and_services_are_unimplemented(serve):
    served = await serve()
    for path in ("/quire.v1.InferenceService/Nothing", "/no.such.Service/Generate"):
        failure = await failure_of(served.channel.unary_unary(path)(b""))
        assert failure.code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_call_that_nobody_answers_for_holds_no_task(serve):
    served = await serve(FakeEngine(pause_at=1))
    before = len(asyncio.all_tasks())
    calls = [served.stub.StreamGenerate(stream_request(5)) for _ in range(20)]
    for call in calls:
        await call.read()
    for call in calls:
        call.cancel()
    await assert_freed(served)
    await served.until(lambda: len(asyncio.all_tasks()) <= before)

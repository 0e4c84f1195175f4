"""The client against a real loop on a real socket: streams, cancels, lost engines, bad listeners."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from model.interface import Sampling
from service.engine import front_end
from service.engine.client import EngineClient
from service.engine.framing import encode_frame
from service.engine.messages import FinishCode, Hello, StepStats
from tests.engine.fake_process import FACTS, STEP_SECONDS
from tests.engine.fake_runner import SHAPE, expected_tokens
from tests.engine.ledger import make_submit
from tests.engine.served import Recorder, ServedEngine, until

PROMPT = [1, 2, 3, 4, 5]
Serve = Callable[..., ServedEngine]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "engine.sock")


@pytest.fixture
def serve(path: str) -> Iterator[Serve]:
    """Starts an engine; those not ended by the test end with it."""
    engines: list[ServedEngine] = []

    def start(depth: int = 0) -> ServedEngine:
        while engines:
            engines.pop().end()
        engines.append(ServedEngine(path, depth))
        return engines[0]

    yield start
    for engine in engines:
        engine.end()


class Events:
    """What the client told about the engine."""

    def __init__(self) -> None:
        self.hellos: list[Hello] = []
        self.num_downs = 0
        self.stats: list[StepStats] = []

    def down(self) -> None:
        self.num_downs += 1


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
async def client(path: str, events: Events) -> AsyncIterator[EngineClient]:
    client = EngineClient(
        path, on_up=events.hellos.append, on_down=events.down, on_stats=events.stats.append, max_resubmissions=2
    )
    running = asyncio.create_task(client.run())
    yield client
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_sequence_streams_to_its_end(serve: Serve, client: EngineClient, events: Events) -> None:
    serve()
    await until(lambda: client.is_up)
    recorder = Recorder()
    client.submit(make_submit(7, PROMPT, 12, seed=4, num_logprobs=1), recorder)
    assert client.num_open == 1
    assert await recorder.end() is FinishCode.LENGTH
    assert recorder.token_ids == expected_tokens(PROMPT, 12, Sampling(seed=4))
    assert [start.id for start in recorder.starts] == [7]
    assert [len(logprobs.top_ids) for logprobs in recorder.logprobs if logprobs] == [1] * 12
    assert client.num_open == 0
    assert client.hello == events.hellos[0] == Hello(FACTS, SHAPE)
    await until(lambda: client.stats.free_blocks == SHAPE.num_blocks)
    assert client.stats == events.stats[-1]


async def test_what_is_submitted_before_the_engine_is_up_waits(serve: Serve, client: EngineClient) -> None:
    recorder = Recorder()
    client.submit(make_submit(1, PROMPT, 3), recorder)
    assert not client.is_up
    serve()
    assert await recorder.end() is FinishCode.LENGTH


async def test_a_cancel_ends_with_cancelled(serve: Serve, client: EngineClient) -> None:
    engine = serve()
    await until(lambda: client.is_up)
    recorder = Recorder()
    client.submit(make_submit(1, PROMPT, 120), recorder)
    await until(lambda: len(recorder.token_ids) > 2)
    client.cancel(1)
    client.cancel(1)
    assert await recorder.end() is FinishCode.CANCELLED
    client.cancel(1)
    await until(lambda: client.stats.free_blocks == SHAPE.num_blocks)
    assert not engine.engine.has_work


async def test_a_listener_may_cancel_from_within(serve: Serve, client: EngineClient) -> None:
    serve()
    recorder = Recorder(on_token=lambda token_id: client.cancel(1))
    client.submit(make_submit(1, PROMPT, 120), recorder)
    assert await recorder.end() is FinishCode.CANCELLED


async def test_a_cancel_without_an_engine_ends_at_once(client: EngineClient) -> None:
    recorder = Recorder()
    client.submit(make_submit(1, PROMPT, 3), recorder)
    client.cancel(1)
    assert recorder.ended.result() is FinishCode.CANCELLED
    assert client.num_open == 0


async def test_streams_go_on_in_the_next_engine(serve: Serve, client: EngineClient, events: Events) -> None:
    engine = serve()
    await until(lambda: client.is_up)
    recorders = [Recorder() for _ in range(4)]
    for index, recorder in enumerate(recorders):
        client.submit(make_submit(index, [*PROMPT, index], 60, seed=index), recorder)
    await until(lambda: all(len(recorder.token_ids) > 5 for recorder in recorders))
    engine.gate.clear()
    held = [len(recorder.token_ids) for recorder in recorders]
    serve()
    assert [await recorder.end() for recorder in recorders] == [FinishCode.LENGTH] * 4
    assert max(held) < 60, "the first engine was lost before the end"
    for index, recorder in enumerate(recorders):
        assert recorder.token_ids == expected_tokens([*PROMPT, index], 60, Sampling(seed=index))
        assert len(recorder.starts) == 1
    assert (len(events.hellos), events.num_downs) == (2, 1)


async def test_what_was_cancelled_is_not_resubmitted(serve: Serve, client: EngineClient, events: Events) -> None:
    engine = serve()
    await until(lambda: client.is_up)
    engine.gate.clear()
    recorder = Recorder()
    client.submit(make_submit(1, PROMPT, 60), recorder)
    client.cancel(1)
    await asyncio.to_thread(engine.end)
    assert await recorder.end() is FinishCode.CANCELLED


async def test_resubmissions_are_bounded(path: str, client: EngineClient, events: Events) -> None:
    """Two resubmissions are allowed; the third engine's death loses the sequence."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(20)
        recorder = Recorder()
        client.submit(make_submit(1, PROMPT, 60), recorder)
        for num_deaths in range(3):
            assert not recorder.ended.done()
            connection, _ = await asyncio.to_thread(listener.accept)
            with connection:
                connection.sendall(encode_frame(Hello(FACTS, SHAPE)))
                await until(lambda num=num_deaths: len(events.hellos) == num + 1)  # type: ignore[misc]
            await until(lambda num=num_deaths: events.num_downs == num + 1)  # type: ignore[misc]
        assert await recorder.end() is None
    assert client.num_open == 0


async def test_an_engine_that_sends_garbage_is_disconnected(path: str, client: EngineClient, events: Events) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(20)
        connection, _ = await asyncio.to_thread(listener.accept)
        with connection:
            connection.sendall(encode_frame(Hello(FACTS, SHAPE)))
            await until(lambda: client.is_up)
            connection.sendall(bytes(8))
            connection.settimeout(20)
            await asyncio.to_thread(connection.recv, 1)  # returns when the client hangs up
            await until(lambda: events.num_downs == 1)


async def test_open_sequences_are_lost_when_the_client_stops(path: str, events: Events) -> None:
    client = EngineClient(path, on_up=events.hellos.append, on_down=events.down, on_stats=events.stats.append)
    running = asyncio.create_task(client.run())
    recorder = Recorder()
    client.submit(make_submit(1, PROMPT, 60), recorder)
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert recorder.ended.result() is None


async def test_a_listener_that_raises_loses_only_itself(serve: Serve, client: EngineClient) -> None:
    serve()
    await until(lambda: client.is_up)

    def fail(token_id: int) -> None:
        raise RuntimeError("a bug in a listener")

    bad, good = Recorder(on_token=fail), Recorder()
    client.submit(make_submit(1, PROMPT, 120), bad)
    client.submit(make_submit(2, PROMPT, 20), good)
    assert await good.end() is FinishCode.LENGTH
    await until(lambda: client.stats.num_running == 0)
    assert client.num_open == 0


async def test_two_front_ends_may_use_the_same_ids(serve: Serve, client: EngineClient, path: str) -> None:
    serve()
    other_events = Events()
    other = EngineClient(path, on_up=other_events.hellos.append, on_down=other_events.down, on_stats=print)
    running = asyncio.create_task(other.run())
    mine, theirs = Recorder(), Recorder()
    client.submit(make_submit(1, PROMPT, 20, seed=1), mine)
    other.submit(make_submit(1, PROMPT, 20, seed=2), theirs)
    assert [await mine.end(), await theirs.end()] == [FinishCode.LENGTH] * 2
    assert mine.token_ids == expected_tokens(PROMPT, 20, Sampling(seed=1))
    assert theirs.token_ids == expected_tokens(PROMPT, 20, Sampling(seed=2))
    running.cancel()


async def test_a_front_end_that_disconnects_frees_its_blocks(serve: Serve, client: EngineClient, path: str) -> None:
    engine = serve()
    await until(lambda: client.is_up)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as leaver:
        leaver.connect(path)
        leaver.sendall(encode_frame(make_submit(1, PROMPT, 120)))
        await until(lambda: client.stats.num_running == 1)
    await until(lambda: client.stats.num_running == 0 and client.stats.free_blocks == SHAPE.num_blocks)
    assert not engine.engine.has_work


@pytest.mark.parametrize(
    "data",
    [bytes(8), b"\xff" * 100, encode_frame(make_submit(-1, PROMPT)), encode_frame(make_submit(2**48, PROMPT))],
    ids=["empty frame", "huge frame", "negative id", "large id"],
)
async def test_a_front_end_that_cannot_be_understood_is_alone(
    serve: Serve, client: EngineClient, path: str, data: bytes
) -> None:
    serve()
    await until(lambda: client.is_up)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.settimeout(20)
        stranger.connect(path)
        stranger.sendall(data)
        await asyncio.to_thread(read_to_end, stranger)
    recorder = Recorder()
    client.submit(make_submit(1, PROMPT, 5), recorder)
    assert await recorder.end() is FinishCode.LENGTH


def read_to_end(connection: socket.socket) -> None:
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass


async def test_a_front_end_that_does_not_read_is_dropped(
    serve: Serve, client: EngineClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.front_end.MAX_UNSENT_BYTES", 1000)
    engine = serve()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sleeper:
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sleeper.connect(path)
        submits = [make_submit(index, PROMPT, 120, num_logprobs=90) for index in range(50)]
        for submit in submits:
            sleeper.sendall(encode_frame(submit))
        await until(lambda: client.stats.num_running > 0)
        await until(lambda: client.stats.num_running == 0 and not engine.engine.has_work)


@pytest.mark.parametrize("depth", [0, 1])
async def test_tokens_are_held_but_not_behind_a_prompt_nor_for_ever(
    serve: Serve, client: EngineClient, events: Events, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setattr(front_end, "HOLD_SECONDS", 3600.0)
    served = serve(depth)
    await until(lambda: client.is_up)
    streaming, prompted = Recorder(), Recorder()
    served.num_free_steps = 20
    served.gate.clear()
    client.submit(make_submit(1, PROMPT, 40), streaming)
    await until(lambda: served.num_free_steps == 0 and bool(streaming.token_ids))
    assert len(streaming.token_ids) == 1
    served.prompt_gate.clear()
    client.submit(make_submit(2, PROMPT, 3), prompted)
    served.gate.set()
    # And the step at the gate; one launched ahead of the prompt ends while the prompt is computed.
    await until(lambda: len(streaming.token_ids) == 21 + depth)
    assert not prompted.token_ids
    served.prompt_gate.set()
    assert await streaming.end() == await prompted.end() == FinishCode.LENGTH
    assert streaming.token_ids == expected_tokens(PROMPT, 40, Sampling())
    assert len(events.stats) >= 40  # held ones are not dropped
    assert events.stats[-1].num_running == 0


async def test_a_token_tells_when_it_was_drawn(serve: Serve, client: EngineClient) -> None:
    """Held ones arrive together and were not drawn together."""
    serve()
    await until(lambda: client.is_up)
    recorder = Recorder()
    client.submit(make_submit(1, PROMPT, 12), recorder)
    await recorder.end()
    gaps = [later - earlier for earlier, later in pairwise(recorder.drawn_at)]
    assert min(gaps) >= STEP_SECONDS


async def test_only_its_user_may_open_the_socket(serve: Serve, path: str) -> None:
    serve()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

"""The engine as a real process: ready, killed, told to end, left alone, started wrongly."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model.interface import Backend, Dtype, Quantization, Sampling
from service.config import Settings, let_waiting_threads_sleep
from service.engine.client import EngineClient
from service.engine.heartbeat import ALIVE, BEAT_SECONDS, READY, Heartbeat
from service.engine.messages import FinishCode
from service.engine.process import engine_options, runner_options
from service.engine.progress import LoadProgress
from tests.engine.fake_runner import SHAPE, expected_tokens
from tests.engine.ledger import make_submit
from tests.engine.served import Recorder, until

WAIT_SECONDS = 30
PROMPT = [1, 2, 3, 4, 5]
CRASH_TOKEN = 96


class EngineProcess:
    """A child with its heartbeat pipe."""

    def __init__(self, socket_path: Path) -> None:
        self.beats, writing = os.pipe()
        command = [sys.executable, "-m", "tests.engine.fake_process", "--socket", str(socket_path)]
        self.process = subprocess.Popen(
            [*command, "--heartbeat-fd", str(writing)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
        )
        os.close(writing)
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(Settings().model_dump_json().encode())

    def wait_ready(self) -> None:
        assert os.read(self.beats, 1) == READY

    def wait(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        assert self.process.stderr is not None
        code = self.process.wait(WAIT_SECONDS)
        return code, self.process.stderr.read().decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self.beats)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], EngineProcess]]:
    processes: list[EngineProcess] = []

    def start_one() -> EngineProcess:
        processes.append(EngineProcess(tmp_path / "engine.sock"))
        return processes[-1]

    yield start_one
    for process in processes:
        process.close()


Start = Callable[[], EngineProcess]


@pytest.mark.e2e
def test_it_says_ready_then_beats_while_idle_and_ends_when_told(start: Start, tmp_path: Path) -> None:
    engine = start()
    engine.wait_ready()
    assert stat.S_IMODE((tmp_path / "engine.sock").stat().st_mode) == 0o600
    assert os.read(engine.beats, 1) == ALIVE
    engine.process.send_signal(signal.SIGINT)
    assert os.read(engine.beats, 1) == ALIVE, "SIGINT is not for the engine"
    engine.process.send_signal(signal.SIGTERM)
    assert engine.wait() == (0, "")
    assert not (tmp_path / "engine.sock").exists()


@pytest.mark.e2e
def test_it_ends_when_its_supervisor_is_gone(start: Start) -> None:
    engine = start()
    engine.wait_ready()
    os.close(engine.beats)
    assert engine.wait() == (0, "")
    engine.beats = os.open(os.devnull, os.O_RDONLY)


@pytest.mark.e2e
def test_a_users_mistake_is_one_line(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOAD", "mistake")
    assert start().wait() == (2, "quire: error: no such model\n")


@pytest.mark.e2e
async def test_kill_nine_and_every_stream_goes_on(start: Start, tmp_path: Path) -> None:
    """RELIABILITY P4: no stream hangs, and the tokens equal an undisturbed run's."""
    engine = start()
    client = EngineClient(
        str(tmp_path / "engine.sock"), on_up=lambda hello: None, on_down=lambda: None, on_stats=lambda stats: None
    )
    running = asyncio.create_task(client.run())
    recorders = {index: Recorder() for index in range(8)}
    for index, recorder in recorders.items():
        client.submit(make_submit(index, [*PROMPT, index], 120, seed=index), recorder)
    await until(lambda: all(len(recorder.token_ids) > 10 for recorder in recorders.values()))
    engine.process.kill()
    await until(lambda: not client.is_up)
    assert not any(recorder.ended.done() for recorder in recorders.values())
    start()
    for index, recorder in recorders.items():
        assert await recorder.end() is FinishCode.LENGTH
        assert recorder.token_ids == expected_tokens([*PROMPT, index], 120, Sampling(seed=index))
    running.cancel()


@pytest.mark.e2e
async def test_a_step_that_raises_ends_the_process(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CRASH", str(CRASH_TOKEN))
    engine = start()
    client = EngineClient(
        str(tmp_path / "engine.sock"),
        on_up=lambda hello: None,
        on_down=lambda: None,
        on_stats=lambda stats: None,
        max_resubmissions=0,
    )
    running = asyncio.create_task(client.run())
    recorder = Recorder()
    client.submit(make_submit(1, [CRASH_TOKEN], 5), recorder)
    assert await recorder.end() is None
    code, said = await asyncio.to_thread(engine.wait)
    assert code == 1
    assert "the engine failed" in said
    running.cancel()


def test_settings_reach_the_runner_and_the_loop() -> None:
    settings = Settings(
        quantize="int8",
        backend="native",
        cpu_level="v3",
        pin_threads="on",
        block_size=32,
        kv_cache_mib=3,
        num_blocks=7,
        max_num_seqs=5,
        max_batch_tokens=33,
        context_length=77,
        threads=2,
        prefix_cache=False,
        graphs=False,
        gpu_attention="flash-attention-3",
        target_itl_ms=70,
    )
    options = runner_options(settings)
    assert (options.model_dir, options.dtype) == (str(settings.model), Dtype.BFLOAT16)
    assert (options.quantization, options.backend, options.cpu_level) == (Quantization.INT8, Backend.NATIVE, "v3")
    assert (options.num_threads, options.pins_threads) == (2, True)
    assert (options.block_size, options.kv_cache_bytes, options.num_blocks) == (32, 3 * 2**20, 7)
    assert (options.max_num_seqs, options.max_batch_tokens, options.context_length) == (5, 33, 77)
    assert runner_options(Settings(dtype="float32")).dtype is Dtype.FLOAT32
    by_itself = runner_options(Settings())
    assert (by_itself.cpu_level, by_itself.num_threads, by_itself.pins_threads) == (None, None, None)
    assert (options.captures_graphs, by_itself.captures_graphs) == (False, True)
    assert (options.gpu_attention, by_itself.gpu_attention) == ("flash-attention-3", "triton")
    assert (by_itself.block_size, by_itself.kv_cache_bytes) == (None, None)
    loop = engine_options(settings, SHAPE)
    assert (loop.depth, loop.prefix_cache, loop.target_itl_seconds) == (0, False, 0.07)
    assert engine_options(settings, replace(SHAPE, runs_ahead=True)).depth == 1


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "9"}, None)],
    ids=["unset", "policy given", "count given"],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], policy: str | None
) -> None:
    monkeypatch.setattr(os, "environ", given)
    let_waiting_threads_sleep()
    assert given.get("OMP_WAIT_POLICY") == policy


def test_the_heart_beats_no_faster_than_it_should() -> None:
    reading, writing = os.pipe()
    heartbeat = Heartbeat(writing)
    for now in (10.0, 10.1, 10.0 + BEAT_SECONDS, 10.1 + BEAT_SECONDS, 11.0):
        assert heartbeat.beat(now)
    assert os.read(reading, 100) == READY + 2 * ALIVE
    os.close(reading)
    assert not heartbeat.beat(12.0)
    os.close(writing)


def test_a_full_pipe_does_not_stop_the_heart() -> None:
    reading, writing = os.pipe()
    heartbeat = Heartbeat(writing)
    os.write(writing, bytes(65536))
    assert heartbeat.beat(1.0)
    os.close(reading)
    os.close(writing)


class Terminal:
    """A standard error that is one, or not."""

    def __init__(self, is_a_tty: bool) -> None:
        self.written = ""
        self.is_a_tty = is_a_tty

    def isatty(self) -> bool:
        return self.is_a_tty

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize(
    ("is_a_tty", "patience_seconds", "shows"), [(True, 0, True), (False, 0, False), (True, 60, False)]
)
def test_a_bar_is_for_patient_people_only(
    monkeypatch: pytest.MonkeyPatch, is_a_tty: bool, patience_seconds: float, shows: bool
) -> None:
    terminal = Terminal(is_a_tty)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("service.engine.progress.PATIENCE_SECONDS", patience_seconds)
    monkeypatch.setenv("TERM", "xterm")
    progress = LoadProgress()
    progress(1, 2)
    progress(2, 2)
    progress.stop()
    assert ("loading weights" in terminal.written) == shows

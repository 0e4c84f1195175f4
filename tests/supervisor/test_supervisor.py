"""The supervisor with children that die, hang, refuse to start, or drain slowly."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service import supervisor
from service.config import Settings
from service.errors import StartupError

Run = Callable[..., int]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "record"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, record: Path) -> Run:
    monkeypatch.setattr(supervisor, "ENGINE", "tests.supervisor.fake_engine")
    monkeypatch.setattr(supervisor, "FRONT_END", "tests.supervisor.fake_front_end")
    monkeypatch.setenv("FAKE_RECORD", str(record))

    def start(engine: str, front_end: str, when: Callable[[], bool] | None = None, signals: int = 0) -> int:
        """Runs a supervisor; sends it `signals` SIGTERMs as soon as `when` holds."""
        monkeypatch.setenv("FAKE_ENGINE", engine)
        monkeypatch.setenv("FAKE_FRONT_END", front_end)
        if signals:
            assert when is not None
            threading.Thread(target=send_when, args=(when, signals), daemon=True).start()
        return supervisor.run(Settings(engine_timeout_seconds=1.0, max_engine_restarts=3))

    return start


def send_when(holds: Callable[[], bool], signals: int) -> None:
    while not holds():
        time.sleep(0.01)
    for _ in range(signals):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)


def pids(record: Path, variable: str) -> list[int]:
    lines = record.read_text().splitlines() if record.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(variable)]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def both_started(record: Path) -> bool:
    return bool(pids(record, "FAKE_ENGINE") and pids(record, "FAKE_FRONT_END"))


def test_drains_on_the_first_signal_and_leaves_no_process(run: Run, record: Path) -> None:
    assert run("serve", "serve", lambda: both_started(record), signals=1) == 0
    assert all(is_gone(pid) for pid in pids(record, "FAKE"))
    assert len(pids(record, "FAKE")) == 2


def test_a_signal_before_the_front_end_listens_ends_it_well(run: Run, record: Path) -> None:
    assert run("loading", "loading", lambda: both_started(record), signals=1) == 0
    assert all(is_gone(pid) for pid in pids(record, "FAKE"))


def test_passes_the_second_signal_on(run: Run, record: Path) -> None:
    assert run("serve", "slow drain", lambda: both_started(record), signals=2) == 0


def test_third_signal_kills(run: Run, record: Path) -> None:
    assert run("serve", "deaf", lambda: both_started(record), signals=3) == 1
    assert all(is_gone(pid) for pid in pids(record, "FAKE"))


def test_restarts_an_engine_that_dies(run: Run, record: Path) -> None:
    assert run("die later", "serve", lambda: len(pids(record, "FAKE_ENGINE")) == 3, signals=1) == 0
    assert len(pids(record, "FAKE_ENGINE")) == 3


def test_gives_up_after_the_allowed_restarts(run: Run, record: Path) -> None:
    assert run("crash", "serve") == 1
    assert len(pids(record, "FAKE_ENGINE")) == 4
    assert all(is_gone(pid) for pid in pids(record, "FAKE"))


def test_kills_and_restarts_a_silent_engine(run: Run, record: Path) -> None:
    assert run("silent", "serve", lambda: len(pids(record, "FAKE_ENGINE")) == 2, signals=1) == 0


@pytest.mark.parametrize(("engine", "front_end"), [("mistake", "serve"), ("serve", "mistake")])
def test_a_users_mistake_ends_everything_with_exit_code_2(run: Run, record: Path, engine: str, front_end: str) -> None:
    assert run(engine, front_end) == 2
    assert all(is_gone(pid) for pid in pids(record, "FAKE"))


def test_a_directory_whose_name_no_socket_can_have(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    with pytest.raises(StartupError, match=r"^TMPDIR: .* is too long"):
        run("serve", "serve")
    assert not list(directory.iterdir())


def test_a_front_end_that_ends_by_itself_is_a_failure(run: Run, record: Path) -> None:
    assert run("serve", "crash") == 1

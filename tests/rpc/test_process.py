"""The front end as a process of its own: what it prints, how it ends, what it writes to its supervisor's pipe."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.config import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]


class Process:
    """A front-end process with its heartbeat pipe, beside an engine that plays dead or answers."""

    def __init__(self, module: str, socket_path: Path, **settings: object) -> None:
        self.beats, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--socket", str(socket_path), "--heartbeat-fd", str(writing)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        assert self.process.stdin is not None
        self.process.stdin.write(Settings(**settings).model_dump_json())  # type: ignore[arg-type]
        self.process.stdin.close()
        self.process.stdin = None

    def wait_beat(self, beat: bytes) -> None:
        seen = b""
        while beat not in seen:
            assert select.select([self.beats], [], [], 30)[0], "no beat"
            read = os.read(self.beats, 1000)
            assert read, self.process.communicate()
            seen += read

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def make(module: str = "service.server", **settings: object) -> Process:
        defaults: dict[str, object] = {"port": 0, "metrics_port": 0, "lame_duck_seconds": 0.0}
        process = Process(module, tmp_path / "engine.sock", **defaults | settings)
        started.append(process)
        return process

    yield make
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.process.communicate()
        os.close(process.beats)


@pytest.mark.parametrize("busy", ["port", "metrics_port"])
def test_a_busy_port_is_one_line_and_exit_code_2(start, busy):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = start(**{busy: taken.getsockname()[1]}).end()
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"quire: error: .*cannot listen on 127\.0\.0\.1:\d+: Address already in use \(--(metrics-)?port 0 .*\)\n", err
    )


def test_a_missing_model_is_one_line_and_exit_code_2(start, tmp_path):
    code, out, err = start(model=tmp_path).end()
    assert (code, out) == (2, "")
    assert err.startswith("quire: error: ")
    assert err.count("\n") == 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_without_an_engine_it_lives_and_a_signal_ends_it(start):
    port = free_port()
    process = start(port=port)
    process.wait_beat(b".")
    assert os.sched_getscheduler(process.process.pid) == os.SCHED_BATCH  # it takes no core from the kernels' threads
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        live = health.Check(health_pb2.HealthCheckRequest(service="quire.live"), timeout=20, wait_for_ready=True)
        ready = health.Check(health_pb2.HealthCheckRequest(service="quire.v1.InferenceService"), timeout=20)
    assert (live.status, ready.status) == (1, 2)
    process.process.send_signal(signal.SIGINT)  # the supervisor's business
    process.process.send_signal(signal.SIGTERM)
    code, out, err = process.end()
    assert (code, out) == (0, "")
    assert "Traceback" not in err


def test_without_a_supervisor_it_ends(start):
    process = start()
    process.wait_beat(b".")
    os.close(process.beats)
    process.beats = os.open(os.devnull, os.O_RDONLY)
    assert process.end()[0] == 0


def test_ready_with_a_banner_whose_command_is_found(start):
    process = start("tests.rpc.front_end_with_fake_engine")
    process.wait_beat(b"R")
    process.process.send_signal(signal.SIGTERM)
    code, out, err = process.end()
    assert code == 0, err
    assert "quire-default" in out
    command = next(line for line in out.splitlines() if " generate " in line)
    executable = command.split()[0]
    assert (ROOT / executable).exists()
    assert "Traceback" not in err

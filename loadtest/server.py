"""A fresh server for a measurement: the real `quire serve`, in its own processes, on free ports, stopped by SIGTERM."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.machine import ROOT
from loadtest.ports import free_ports
from service.client.blocking import BlockingClient
from service.client.errors import QuireClientError
from service.client.types import HealthStatus

START_SECONDS = 120.0
STOP_SECONDS = 60.0


class ServerFailed(Exception):
    """The server did not start, or did not stop well; the message names its log."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where the server answers. `ready_seconds` passed from its start until it was ready."""

    address: str
    metrics_url: str
    pid: int
    """Of the supervisor, whose children do the work."""
    ready_seconds: float

    def metrics(self) -> dict[str, float]:
        """All samples by name, those of one name and different labels added up."""
        with urllib.request.urlopen(self.metrics_url, timeout=5) as response:
            return parse_metrics(response.read().decode())


def parse_metrics(text: str) -> dict[str, float]:
    """Sums of the samples of a Prometheus text page, by name."""
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^([a-z_]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


@contextmanager
def running_server(log: Path, arguments: Sequence[str] = ()) -> Iterator[RunningServer]:
    """Starts a server and stops it with SIGTERM at the end. Raises ServerFailed if it does not end with 0."""
    log.parent.mkdir(parents=True, exist_ok=True)
    port, metrics_port = free_ports(2)
    command = [
        sys.executable,
        "-m",
        "service",
        "serve",
        "--port",
        str(port),
        "--metrics-port",
        str(metrics_port),
        *arguments,
    ]
    with log.open("wb") as stream:
        started_at = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            address = f"127.0.0.1:{port}"
            _wait_until_ready(process, address, log)
            ready_seconds = time.monotonic() - started_at
            yield RunningServer(address, f"http://127.0.0.1:{metrics_port}/metrics", process.pid, ready_seconds)
            _stop(process, log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with BlockingClient(address) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerFailed(f"the server ended with {process.returncode} while starting; see {log}")
            try:
                if client.health(timeout_seconds=1) is HealthStatus.SERVING:
                    return
            except QuireClientError:
                pass  # nobody listens yet
            time.sleep(0.05)
    raise ServerFailed(f"the server was not ready after {START_SECONDS:.0f} s; see {log}")


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise ServerFailed(f"the server was still there {STOP_SECONDS:.0f} s after SIGTERM; see {log}") from None
    if code:
        raise ServerFailed(f"the server ended with {code} after SIGTERM; see {log}")

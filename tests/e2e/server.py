"""A real server in its own processes, as a caller sees it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.client.blocking import BlockingClient
from service.client.errors import QuireClientError
from service.client.types import HealthStatus

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 60.0


class Server:
    """One `quire serve`. Its output goes to `log`."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.log = log
        self.port, self.metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "service", "serve", "--port", str(self.port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--metrics-port", str(self.metrics_port), "--log-format", "json", *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def wait_ready(self) -> None:
        def is_serving() -> bool:
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
            return self.health() is HealthStatus.SERVING

        wait_until(is_serving, READY_SECONDS)

    def health(self, service: str = "quire.v1.InferenceService") -> HealthStatus | None:
        """What the server says; None when it does not answer."""
        with BlockingClient(self.address) as client, suppress(QuireClientError):
            return client.health(service, timeout_seconds=2.0)
        return None

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str, **labels: str) -> float:
        return sample(self.scrape(), name, **labels)

    def pid_of(self, module: str) -> int:
        """The process id of the child that runs this module."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        (pid,) = (int(line.split()[0]) for line in listed.stdout.splitlines() if module in line)
        return pid

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ends it and returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """Whatever is left of it, without asking."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def sample(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels; 0 where there is none."""
    total = 0.0
    for found, inner, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
        given = dict(re.findall(r'(\w+)="([^"]*)"', inner))
        if found == name and labels.items() <= given.items():
            total += float(value)
    return total


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Polls until it holds; fails when it does not within the time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


@contextmanager
def serving(log: Path, *flags: str) -> Iterator[Server]:
    """A server that is ready; killed at the end unless it has ended."""
    server = Server(log, *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return int(holder.getsockname()[1])


def run_cli(*arguments: str, stdin: str | None = None, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """`quire …`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        timeout=seconds,
        cwd=ROOT,
        check=False,
    )


def log_lines(server: Server) -> list[dict[str, object]]:
    """The server's log, parsed; lines that are not JSON, such as the banner's, are left out."""
    lines = []
    for line in server.log.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

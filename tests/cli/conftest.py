"""A scripted server, and the command line called in this process or as one of its own."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.client.server import FakeServer, running

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """Commands find it by QUIRE_ADDRESS."""
    with running() as server:
        monkeypatch.setenv("QUIRE_ADDRESS", server.address)
        yield server


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `quire` as a process with pipes, and leaves none behind."""
    processes = []

    def start(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([sys.executable, "-m", "service", *arguments], **{**streams, **options})
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()

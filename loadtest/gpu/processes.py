"""One process under a time limit, its output shown and kept as it comes. Standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

GRACE_SECONDS = 3.0
"""Between the signal that a process may answer and the one that it may not."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    exit_code: int | None
    """None where it had to be ended."""
    seconds: float
    last_line: str
    """The last that it said."""


def run(
    command: Sequence[str], limit_seconds: float, log: Path, *, folder: Path, environment: Mapping[str, str]
) -> Ended:
    """Runs a command to its end or its limit. What it says goes to the terminal and, appended, to `log`.

    It gets a session of its own, so that what it started is ended with it.
    """
    started_at = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    said = [""]
    reader = threading.Thread(target=_copy, args=(process.stdout, log, said), daemon=True)
    reader.start()
    try:
        exit_code: int | None = process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        exit_code = None
    finally:
        _end_session(process)
    # A process that left the session may still hold the pipe: then the rest of what it says is nobody's.
    reader.join(GRACE_SECONDS)
    return Ended(exit_code, time.monotonic() - started_at, said[0])


def _end_session(process: subprocess.Popen[str]) -> None:
    """Ends the process, and whatever of its session outlived it."""
    _signal(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(session: int, number: int) -> None:
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(session, number)


def _copy(stream: IO[str], log: Path, said: list[str]) -> None:
    with log.open("a") as file:
        for line in stream:
            file.write(line)
            file.flush()
            sys.stdout.write(f"    {line}")
            sys.stdout.flush()
            said[0] = line.strip() or said[0]

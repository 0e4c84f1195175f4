"""Owns the processes of a server: starts engine and front end, watches heartbeats, restarts the engine, ends both.

It knows neither gRPC nor torch, nor anything about requests: the front end resubmits what was open when an engine
died. Each child gets the settings as JSON on its standard input and the writing end of a pipe; it writes one byte when
it is ready (b"R") and a byte now and then while it lives. The pipe works both ways: a child whose supervisor died
finds it broken and ends itself.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from service.config import Settings
from service.engine.heartbeat import READY
from service.errors import StartupError

log = logging.getLogger("quire.supervisor")

ENGINE = "service.engine.process"
FRONT_END = "service.server"
EXIT_USER_MISTAKE = 2
RESTART_WINDOW_SECONDS = 300.0
KILL_MARGIN_SECONDS = 10.0
"""Time beyond lame duck and drain after which a front end that does not end is killed."""
WATCH_SECONDS = 0.25
MAX_SOCKET_PATH_BYTES = 103
"""What the path of a unix socket may have on every system (Linux takes 107)."""


@dataclass
class Child:
    """A process and what its heartbeat pipe told."""

    module: str
    process: subprocess.Popen[bytes]
    heartbeat: int
    last_beat: float
    is_ready: bool = False

    def read_beats(self, now: float) -> bool:
        """Takes what the pipe holds; False at its end."""
        beats = os.read(self.heartbeat, 4096)
        if beats:
            self.last_beat = now
            self.is_ready = self.is_ready or READY in beats
        return bool(beats)

    def silent_seconds(self, now: float) -> float:
        """How long a ready child has said nothing. Loading weights may take as long as it takes."""
        return now - self.last_beat if self.is_ready else 0.0

    def send(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """Kills what is left and frees the pipe."""
        self.send(signal.SIGKILL)
        self.process.wait()
        os.close(self.heartbeat)


@dataclass
class RestartBudget:
    """At most `limit` restarts within the window."""

    limit: int
    times: deque[float] = field(default_factory=deque)

    def take(self, now: float) -> bool:
        while self.times and now - self.times[0] > RESTART_WINDOW_SECONDS:
            self.times.popleft()
        if len(self.times) >= self.limit:
            return False
        self.times.append(now)
        return True


class Supervisor:
    """One server's life: `run` returns its exit code."""

    def __init__(self, settings: Settings, directory: Path, signals: socket.socket) -> None:
        self._settings = settings
        self._socket_path = _socket_path(directory)
        self._signals = signals
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)
        self._restarts = RestartBudget(settings.max_engine_restarts)
        self._num_signals = 0
        self._kill_at = float("inf")
        # The engine imports torch, which takes longest: it goes first.
        self._engine = self._start(ENGINE)
        self._front_end = self._start(FRONT_END)

    def run(self) -> int:
        """Watches until the front end has ended, for whatever reason; then nothing is left running."""
        try:
            while (code := self._front_end.process.poll()) is None:
                self._wait()
                now = time.monotonic()
                if now > self._kill_at:
                    log.error("the front end did not end in time; killing it")
                    self._front_end.send(signal.SIGKILL)
                if not self._keep_engine(now):
                    return self._give_up()
            if self._num_signals == 0 and code != EXIT_USER_MISTAKE:
                log.error("the front end ended by itself, exit code %d", code)
                return 1
            if code == -signal.SIGTERM:
                return 0  # it was told to end before it could listen: it had no callers yet
            return code if code >= 0 else 1
        finally:
            self._front_end.end()
            self._engine.end()
            self._selector.close()

    def _start(self, module: str) -> Child:
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--socket", str(self._socket_path), "--heartbeat-fd", str(writing)],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            process_group=0,  # a terminal's Ctrl-C is for the supervisor to pass on
        )
        os.close(writing)
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin:  # a child that died at once is for the watch to see
            process.stdin.write(self._settings.model_dump_json().encode())
        child = Child(module, process, reading, time.monotonic())
        self._selector.register(reading, selectors.EVENT_READ, child)
        return child

    def _wait(self) -> None:
        """Sleeps until something happened, a quarter of a second at most, and takes note of it."""
        for key, _ in self._selector.select(WATCH_SECONDS):
            child: Child | None = key.data
            if child is None:
                for _ in self._signals.recv(64):
                    self._on_signal()
            elif not child.read_beats(time.monotonic()):
                self._selector.unregister(child.heartbeat)
                child.process.wait()

    def _on_signal(self) -> None:
        """The first signal drains, the second skips ahead, the third kills."""
        self._num_signals += 1
        if self._num_signals >= 3:
            self._front_end.send(signal.SIGKILL)
            return
        patience = self._settings.lame_duck_seconds + self._settings.drain_seconds + KILL_MARGIN_SECONDS
        self._kill_at = time.monotonic() + (patience if self._num_signals == 1 else KILL_MARGIN_SECONDS)
        self._front_end.send(signal.SIGTERM)

    def _keep_engine(self, now: float) -> bool:
        """Restarts an engine that is dead or silent. False when it must not be restarted any more."""
        engine = self._engine
        if engine.silent_seconds(now) > self._settings.engine_timeout_seconds:
            log.error("the engine has been silent for %.1f s; killing it", engine.silent_seconds(now))
            engine.send(signal.SIGKILL)
            engine.process.wait()
        code = engine.process.poll()
        if code is None:
            return True
        if code == EXIT_USER_MISTAKE or not self._restarts.take(now):
            return False
        log.error("the engine ended, exit code %d; restarting it", code)
        self._forget(engine)
        self._engine = self._start(ENGINE)
        return True

    def _forget(self, child: Child) -> None:
        if child.heartbeat in self._selector.get_map():
            self._selector.unregister(child.heartbeat)
        child.end()

    def _give_up(self) -> int:
        """The engine is gone for good: callers are told, then everything ends."""
        code = self._engine.process.returncode
        if code != EXIT_USER_MISTAKE:
            log.error("the engine failed %d times within five minutes; giving up", self._restarts.limit + 1)
        for _ in range(2):  # the second skips the drain: nothing can finish without an engine
            self._front_end.send(signal.SIGTERM)
            time.sleep(WATCH_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            self._front_end.process.wait(KILL_MARGIN_SECONDS)
        return EXIT_USER_MISTAKE if code == EXIT_USER_MISTAKE else 1


def _socket_path(directory: Path) -> Path:
    path = directory / "engine.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise StartupError(f"TMPDIR: {directory.parent} is too long a name for a unix socket in it")
    return path


@contextmanager
def _caught_signals() -> Iterator[socket.socket]:
    """SIGTERM and SIGINT become bytes on a socket; everything is put back at the end."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda *_: None) for number in numbers]
    previous_fd = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
        reading.close()
        writing.close()


def run(settings: Settings) -> int:
    """Serves until told to stop. Returns the exit code: 0 after a drain, 2 for a user's mistake, 1 for a failure.

    Raises StartupError when the directory for temporary files cannot hold a socket.
    """
    # The directory is private (mode 0700): whoever reaches the socket in it speaks to the engine.
    with _caught_signals() as signals, tempfile.TemporaryDirectory(prefix="quire-") as directory:
        return Supervisor(settings, Path(directory), signals).run()

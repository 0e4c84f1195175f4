"""The engine's busy loop: take commands, step, send reports, beat; asleep in select when there is nothing to do.

One thread. It owns the listening socket and the connections, and knows neither what a step computes nor what callers
want. A front end that disconnects takes its sequences with it.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from service.engine.engine import Engine
from service.engine.front_end import FrontEnd, FrontEndLost
from service.engine.heartbeat import BEAT_SECONDS, Heartbeat
from service.engine.messages import Hello, Report, Submit

log = logging.getLogger("quire.engine")


class EngineLoop:
    """Serves front ends on a unix socket that only this user may open."""

    def __init__(self, engine: Engine, hello: Hello, socket_path: str, heartbeat: Heartbeat) -> None:
        self._engine = engine
        self._hello = hello
        self._socket_path = socket_path
        self._heartbeat = heartbeat
        self._selector = selectors.DefaultSelector()
        self._front_ends: dict[int, FrontEnd] = {}
        self._num_accepted = 0
        self._listener = _listen(socket_path)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Turns until nobody reads the heartbeat any more."""
        while self._heartbeat.beat(time.monotonic()):
            self._poll(0.0 if self._engine.has_work else BEAT_SECONDS)
            if self._engine.expects_prompts:
                self._release()
            report = self._engine.step()
            if report is not None:
                self._deliver(report)

    def close(self) -> None:
        """Closes every socket and takes the path away."""
        for front_end in self._front_ends.values():
            front_end.connection.close()
        self._listener.close()
        self._selector.close()
        with suppress(FileNotFoundError):
            os.unlink(self._socket_path)

    def _poll(self, timeout_seconds: float) -> None:
        """Takes in what has arrived and sends what was kept; waits for either, at most this long."""
        for key, events in self._selector.select(timeout_seconds):
            front_end: FrontEnd | None = key.data
            if front_end is None:
                self._accept()
                continue
            try:
                if events & selectors.EVENT_READ:
                    self._take_commands(front_end)
                if events & selectors.EVENT_WRITE:
                    front_end.flush()
                    self._watch(front_end)
            except FrontEndLost as reason:
                self._drop(front_end, reason)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._num_accepted += 1
        front_end = FrontEnd(self._num_accepted, connection)
        self._front_ends[front_end.number] = front_end
        self._selector.register(connection, selectors.EVENT_READ, front_end)
        try:
            front_end.send(self._hello)
        except FrontEndLost as reason:
            self._drop(front_end, reason)

    def _take_commands(self, front_end: FrontEnd) -> None:
        for message in front_end.read():
            if isinstance(message, Submit):
                self._engine.submit(message)
            else:
                self._engine.cancel(message.ids)

    def _deliver(self, report: Report) -> None:
        """One report per front end, with its own sequences and everyone's statistics.

        It can be held where the next one comes soon: there is one, and it only decodes.
        """
        now, can_hold = time.monotonic(), self._engine.has_work and not self._engine.expects_prompts
        self._for_each(lambda front_end: front_end.report(report, now, can_hold=can_hold))

    def _release(self) -> None:
        """What is held goes out before a step that may last long."""
        now = time.monotonic()
        self._for_each(lambda front_end: front_end.release(now))

    def _for_each(self, send: Callable[[FrontEnd], None]) -> None:
        """Has every front end send something, and drops those that are lost."""
        for front_end in list(self._front_ends.values()):
            try:
                send(front_end)
                self._watch(front_end)
            except FrontEndLost as reason:
                self._drop(front_end, reason)

    def _watch(self, front_end: FrontEnd) -> None:
        """Waits for a socket to take more only while there is more."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if front_end.has_unsent else 0)
        if self._selector.get_key(front_end.connection).events != events:
            self._selector.modify(front_end.connection, events, front_end)

    def _drop(self, front_end: FrontEnd, reason: FrontEndLost) -> None:
        """Ends everything that a lost front end had asked for."""
        level = logging.INFO if front_end.open_ids else logging.DEBUG
        log.log(level, "a front end is gone: %s; cancelling %d sequences", reason, len(front_end.open_ids))
        self._engine.cancel(front_end.open_ids)
        self._selector.unregister(front_end.connection)
        front_end.connection.close()
        del self._front_ends[front_end.number]


def _listen(socket_path: str) -> socket.socket:
    """A listening unix socket of mode 0600. A path left over by an engine that was killed is taken over."""
    with suppress(FileNotFoundError):
        os.unlink(socket_path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(socket_path)
    os.chmod(socket_path, 0o600)  # nobody can connect before listen
    listener.listen()
    return listener

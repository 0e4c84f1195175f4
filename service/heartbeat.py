"""Tells the supervisor that this process' event loop turns, and notices when there is no supervisor any more.

The bytes and their pace are the engine's heartbeat's (service/engine/heartbeat.py), which this is for an event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from service.engine.heartbeat import ALIVE, BEAT_SECONDS, READY


class Heartbeat:
    """The writing end of the pipe. `on_lag` hears how late each beat was, `on_orphaned` that nobody reads any more."""

    def __init__(self, fd: int, *, on_lag: Callable[[float], None], on_orphaned: Callable[[], None]) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._on_lag = on_lag
        self._on_orphaned = on_orphaned

    def ready(self) -> None:
        """The server serves. From now on silence means trouble."""
        self._write(READY)

    async def run(self) -> None:
        """Beats until it is cancelled, or until there is no supervisor."""
        while self._write(ALIVE):
            began = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)
            self._on_lag(max(time.monotonic() - began - BEAT_SECONDS, 0.0))
        self._on_orphaned()

    def _write(self, beat: bytes) -> bool:
        try:
            os.write(self._fd, beat)
        except BlockingIOError:
            pass  # a supervisor that is stopped for a while finds the pipe full
        except BrokenPipeError:
            return False
        return True

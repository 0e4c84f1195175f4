"""Tells the supervisor that this process' event loop turns, and notices when there is no supervisor any more.

The pipe's protocol is service/supervisor.py's: b"R" when ready, a byte now and then while alive.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

PERIOD_SECONDS = 0.25


class Heartbeat:
    """The writing end of the pipe. `on_lag` hears how late each beat was, `on_orphaned` that nobody reads any more."""

    def __init__(self, fd: int, *, on_lag: Callable[[float], None], on_orphaned: Callable[[], None]) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._on_lag = on_lag
        self._on_orphaned = on_orphaned

    def ready(self) -> None:
        """The server serves. From now on silence means trouble."""
        self._write(b"R")

    async def run(self) -> None:
        """Beats until it is cancelled, or until there is no supervisor."""
        while self._write(b"."):
            began = time.monotonic()
            await asyncio.sleep(PERIOD_SECONDS)
            self._on_lag(max(time.monotonic() - began - PERIOD_SECONDS, 0.0))
        self._on_orphaned()

    def _write(self, beat: bytes) -> bool:
        try:
            os.write(self._fd, beat)
        except BlockingIOError:
            pass  # a supervisor that is stopped for a while finds the pipe full
        except BrokenPipeError:
            return False
        return True

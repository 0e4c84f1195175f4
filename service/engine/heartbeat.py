"""The engine's sign of life: bytes on a pipe that the supervisor reads.

Between two bytes lie at least BEAT_SECONDS, and little more while the loop turns. The pipe works the other way too:
when the supervisor has died, writing fails.
"""

from __future__ import annotations

import os
from contextlib import suppress

BEAT_SECONDS = 0.25
READY = b"R"
ALIVE = b"."


class Heartbeat:
    """Owns the writing end. The first beat says ready."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)  # a supervisor that does not read must not stop the engine
        self._fd = fd
        self._next = READY
        self._due = 0.0

    def beat(self, now: float) -> bool:
        """Writes a byte if one is due. False when nobody can read it any more."""
        if now < self._due:
            return True
        try:
            with suppress(BlockingIOError):
                os.write(self._fd, self._next)
        except BrokenPipeError:
            return False
        self._next = ALIVE
        self._due = now + BEAT_SECONDS
        return True

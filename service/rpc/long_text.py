"""Work on long texts, beside the event loop: threads of its own, and a bounded queue before them.

Short work is done at once. It does not know what the work is, nor for whom: prompts of generations and texts of
Tokenize go through rooms of their own, so that the one never waits for the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.errors import UNMEASURED_RETRY_SECONDS, QueueFull

LONG_TEXT_CHARS = 8192
"""Work on more than this would hold up everyone's streams."""
MAX_OPEN = 64

T = TypeVar("T")


class LongTextRoom:
    """One thread, and at most `max_open` pieces of work that wait for it or are in it."""

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="long-text")
        self._max_open = max_open
        self._num_open = 0

    async def run(self, num_chars: int, work: Callable[[], T]) -> T:
        """Does the work here when it is short, in the thread otherwise. Raises QueueFull."""
        if num_chars <= LONG_TEXT_CHARS:
            return work()
        if self._num_open >= self._max_open:
            raise QueueFull(metadata={"queueDepth": self._num_open}, retry_after_seconds=UNMEASURED_RETRY_SECONDS)
        self._num_open += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._num_open -= 1

"""Owns the queue at the door: who may wait, for how long that will be, and when a refused caller should come again.

A request waits from its acceptance until the engine schedules it for the first time. Admission counts; it neither holds
requests nor orders them (the engine does), and knows neither gRPC nor text.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.engine.messages import StepStats
from service.errors import (
    UNMEASURED_RETRY_SECONDS,
    DeadlineUnreachable,
    QueueFull,
    QuireError,
    ServerDraining,
    ServerStarting,
)

NUM_MEASURED_STARTS = 64
"""The drain rate is the mean of this many latest starts."""
MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 30.0
RATE_WINDOW_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place: waiting once admitted, then running, then gone."""

    num_tokens: int
    is_waiting: bool = True


class Admission:
    """Accepts or refuses at once. All times are seconds of `clock`, which is monotonic."""

    def __init__(
        self, *, num_slots: int, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`num_slots` sequences run at once; beyond them `max_requests` and `max_tokens` prompt tokens may wait."""
        self._num_slots = num_slots
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._was_started = False
        self._is_draining = False
        self._engine_has_queue = False
        self._last_start: float | None = None
        self._gaps: deque[float] = deque(maxlen=NUM_MEASURED_STARTS)
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        self.num_running = 0

    @property
    def is_accepting(self) -> bool:
        """Whether a request that arrives now is not refused for the server's own state."""
        return self._was_started and not self._is_draining

    @property
    def estimated_wait_seconds(self) -> float:
        """How long a request that arrives now would wait; 0 where nothing waits or nothing was measured."""
        has_room = self.num_running < self._num_slots and not self._engine_has_queue
        if has_room or not self._gaps:
            return 0.0
        return self.num_waiting * sum(self._gaps) / len(self._gaps)

    def open(self) -> None:
        """The engine is up for the first time. One that is lost later only makes requests wait."""
        self._was_started = True

    def drain(self) -> None:
        """From now on everything is refused."""
        self._is_draining = True

    def on_stats(self, stats: StepStats) -> None:
        """Notes whether the engine left sequences waiting after a step: then a free slot does not mean room."""
        self._engine_has_queue = stats.num_waiting > 0

    def check(self) -> None:
        """Refuses what `admit` would refuse whatever the request; cheap, so that it can go before tokenising."""
        if self._is_draining:
            raise ServerDraining(retry_after_seconds=UNMEASURED_RETRY_SECONDS)
        if not self._was_started:
            raise ServerStarting(retry_after_seconds=UNMEASURED_RETRY_SECONDS)
        # A sequence for which a slot is free is on its way rather than in the queue.
        if self.num_waiting + self.num_running >= self._num_slots + self._max_requests:
            raise self._queue_full()

    def admit(self, ticket: Ticket, deadline: float) -> None:
        """Takes a place in the queue.

        Raises ServerStarting, ServerDraining, QueueFull, or DeadlineUnreachable when the wait would pass `deadline`.
        """
        self.check()
        # A prompt larger than the whole bound must be able to run: it may wait alone.
        if self.num_waiting and self.num_waiting_tokens + ticket.num_tokens > self._max_tokens:
            raise self._queue_full()
        wait = self.estimated_wait_seconds
        if self._clock() + wait > deadline:
            raise DeadlineUnreachable(
                metadata={"estimatedWaitMs": round(wait * 1000)}, retry_after_seconds=self.retry_after_seconds
            )
        self.num_waiting += 1
        self.num_waiting_tokens += ticket.num_tokens

    def start(self, ticket: Ticket) -> None:
        """The engine scheduled it: it waits no more. Measures the drain rate."""
        assert ticket.is_waiting, "a sequence starts once"
        self._stop_waiting(ticket)
        self.num_running += 1
        now = self._clock()
        # A start says how fast the queue drains only when it had to wait for the one before it.
        if self._last_start is not None:
            self._gaps.append(now - self._last_start)
        self._last_start = now if self.num_waiting else None

    def leave(self, ticket: Ticket) -> None:
        """It ended, in whatever state it was."""
        if ticket.is_waiting:
            self._stop_waiting(ticket)
        else:
            self.num_running -= 1
        if not self.num_waiting:
            self._last_start = None

    @property
    def retry_after_seconds(self) -> float:
        """When half of the queue will have drained: by then there is room for those who come again."""
        if not self._gaps:
            return UNMEASURED_RETRY_SECONDS
        mean_gap = sum(self._gaps) / len(self._gaps)
        return min(max(self.num_waiting * mean_gap / 2, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def _stop_waiting(self, ticket: Ticket) -> None:
        ticket.is_waiting = False
        self.num_waiting -= 1
        self.num_waiting_tokens -= ticket.num_tokens

    def _queue_full(self) -> QuireError:
        return QueueFull(metadata={"queueDepth": self.num_waiting}, retry_after_seconds=self.retry_after_seconds)


class TokenRate:
    """Tokens per second over the last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, num_tokens: int) -> None:
        self._samples.append((self._clock(), num_tokens))
        self._forget()

    @property
    def per_second(self) -> float:
        self._forget()
        return sum(num_tokens for _, num_tokens in self._samples) / RATE_WINDOW_SECONDS

    def _forget(self) -> None:
        oldest = self._clock() - RATE_WINDOW_SECONDS
        while self._samples and self._samples[0][0] < oldest:
            self._samples.popleft()

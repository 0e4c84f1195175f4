"""Requests that come when they come, whether earlier ones are answered or not: what a rate of them does to latencies.

Arrivals are a Poisson process. Every latency counts from when a request was to be sent, so that a late client hides
nothing; what failed counts as a miss. It does not know what answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.timing import StreamTimes, percentiles_ms
from loadtest.workloads import Work

Answerer = Callable[[Work, float], Awaitable[StreamTimes]]
"""Answers a request that was to be sent at a moment of time.monotonic. What it raises is a failure."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the 99th percentiles may be, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def holds(self, figures: dict[str, Any]) -> bool:
        """Whether the figures of a rate are within them, and nothing failed."""
        if figures["failed"] or not figures["ttft_ms"]:
            return False
        tpot = figures["tpot_ms"]
        return figures["ttft_ms"]["p99"] <= self.ttft_ms and (not tpot or tpot["p99"] <= self.tpot_ms)

    def is_met_by(self, stream: StreamTimes) -> bool:
        """Whether one stream is within them."""
        if stream.reason is not None or not stream.arrivals:
            return False
        return 1_000 * stream.ttft_seconds <= self.ttft_ms and 1_000 * (tpot_seconds(stream) or 0) <= self.tpot_ms


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Seconds from the beginning at which requests come, `rate` of them a second."""
    generator, now = random.Random(seed), 0.0
    while (now := now + generator.expovariate(rate)) < seconds:
        yield now


async def offer(answer: Answerer, works: Iterator[Work], rate: float, seconds: float, seed: int) -> list[StreamTimes]:
    """Sends requests for some seconds, and waits for all answers."""
    begin, tasks = time.monotonic(), []
    for after in arrivals(rate, seconds, seed):
        await asyncio.sleep(begin + after - time.monotonic())
        tasks.append(asyncio.create_task(_answered(answer, next(works), begin + after)))
    return list(await asyncio.gather(*tasks))


async def _answered(answer: Answerer, work: Work, due: float) -> StreamTimes:
    try:
        return await answer(work, due)
    except Exception as error:
        return StreamTimes(due, len(work.prompt), ended_at=time.monotonic(), reason=type(error).__name__)


def tpot_seconds(stream: StreamTimes) -> float | None:
    """(last token - first token) / (tokens - 1); None for a single token."""
    num_tokens = stream.num_tokens
    if num_tokens < 2:
        return None
    return (stream.arrivals[-1][0] - stream.arrivals[0][0]) / (num_tokens - 1)


def figures_of(streams: Sequence[StreamTimes], seconds: float, bounds: Bounds) -> dict[str, Any]:
    """Latencies of what ended well, in milliseconds, and good requests a second."""
    good = [stream for stream in streams if stream.reason is None and stream.arrivals]
    tpots = [tpot for stream in good if (tpot := tpot_seconds(stream)) is not None]
    return {
        "requests": len(streams),
        "failed": len(streams) - len(good),
        "ttft_ms": percentiles_ms([stream.ttft_seconds for stream in good]),
        "itl_ms": percentiles_ms([gap for stream in good for gap in stream.gaps()]),
        "tpot_ms": percentiles_ms(tpots),
        "goodput_per_second": sum(map(bounds.is_met_by, streams)) / seconds,
    }

"""Arrivals that wait for nobody, latencies that count from when a request was due, and what is within bounds."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise, repeat
from statistics import fmean, pstdev

import pytest

from loadtest.open_loop import Bounds, arrivals, figures_of, offer, tpot_seconds
from loadtest.timing import StreamTimes
from loadtest.workloads import Work

BOUNDS = Bounds(ttft_ms=500.0, tpot_ms=30.0)
WORK = Work((16,) * 4, 3)


def stream_of(ttft: float, gap: float, num_tokens: int = 3, reason: str | None = None) -> StreamTimes:
    times = [(10.0 + ttft + index * gap, 1) for index in range(num_tokens)]
    return StreamTimes(10.0, 4, times, ended_at=times[-1][0] if times else 10.0, reason=reason)


def work_for(seconds: float) -> None:
    """Keeps the event loop busy."""
    time.sleep(seconds)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = list(arrivals(50.0, 200.0, seed=1))
    gaps = [right - left for left, right in pairwise([0.0, *times])]
    assert times == sorted(times) and times[-1] < 200
    assert fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert pstdev(gaps) == pytest.approx(1 / 50, rel=0.05)  # an exponential's deviation is its mean
    assert list(arrivals(50.0, 200.0, seed=1)) == times


async def test_requests_are_sent_while_earlier_ones_wait_and_count_from_when_they_were_due() -> None:
    waiting, most = 0, 0

    async def answer(work: Work, due: float) -> StreamTimes:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        work_for(0.03)  # a client that is late, and more so from request to request
        await asyncio.sleep(0.5)
        waiting -= 1
        return StreamTimes(due, len(work.prompt), [(time.monotonic(), work.num_new)], time.monotonic())

    begin = time.monotonic()
    streams = await offer(answer, repeat(WORK), 100.0, 0.25, seed=3)
    due = [begin + after for after in arrivals(100.0, 0.25, seed=3)]
    assert [stream.sent_at for stream in streams] == pytest.approx(due, abs=0.01)
    assert len(streams) > 15 and most > 10


async def test_a_failure_is_a_miss_and_ends_nothing() -> None:
    async def answer(work: Work, due: float) -> StreamTimes:
        if work.num_new == 1:
            raise ConnectionError("gone")
        return StreamTimes(due, len(work.prompt), [(due + 0.1, 3)], due + 0.1)

    works = iter([Work((16,), 1), *[WORK] * 1_000])
    streams = await offer(answer, works, 100.0, 0.2, seed=3)
    assert [stream.reason for stream in streams] == ["ConnectionError", *[None] * (len(streams) - 1)]
    found = figures_of(streams, 0.2, BOUNDS)
    assert (found["requests"], found["failed"]) == (len(streams), 1)
    assert found["goodput_per_second"] == pytest.approx((len(streams) - 1) / 0.2)
    assert not BOUNDS.holds(found)


def test_time_per_token_leaves_the_first_one_out() -> None:
    assert tpot_seconds(stream_of(5.0, 0.1)) == pytest.approx(0.1)
    assert tpot_seconds(stream_of(5.0, 0.1, num_tokens=1)) is None


@pytest.mark.parametrize(
    ("stream", "is_met"),
    [
        (stream_of(0.4, 0.02), True),
        (stream_of(0.6, 0.02), False),
        (stream_of(0.4, 0.04), False),
        (stream_of(0.4, 0.04, num_tokens=1), True),
        (stream_of(0.4, 0.02, reason="DEADLINE_EXCEEDED"), False),
        (stream_of(0.4, 0.02, num_tokens=0), False),
    ],
)
def test_bounds(stream: StreamTimes, is_met: bool) -> None:
    assert BOUNDS.is_met_by(stream) is is_met
    found = figures_of([stream], 2.0, BOUNDS)
    assert BOUNDS.holds(found) is is_met
    assert found["goodput_per_second"] == is_met / 2

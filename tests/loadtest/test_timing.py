"""Each latency means what its definition says."""

from __future__ import annotations

import pytest

from loadtest.timing import StreamTimes, busy_seconds, median_and_spread, percentile, percentiles_ms


def stream(sent_at: float, *arrivals: tuple[float, int]) -> StreamTimes:
    times = StreamTimes(sent_at, 4)
    for when, count in arrivals:
        times.arrived(when, count)
    times.ended_at = arrivals[-1][0] if arrivals else sent_at
    return times


def test_first_token_and_end_count_from_sending() -> None:
    times = stream(10.0, (10.5, 1), (11.0, 1))
    assert times.ttft_seconds == 0.5
    assert times.e2e_seconds == 1.0


def test_tokens_of_one_message_have_no_time_between_them() -> None:
    times = stream(0.0, (1.0, 2), (1.5, 3), (2.5, 1))
    assert times.gaps() == [0.0, 0.5, 0.0, 0.0, 1.0]
    assert len(times.gaps()) == times.num_tokens - 1


def test_a_message_without_tokens_is_no_arrival() -> None:
    assert stream(0.0, (1.0, 0), (2.0, 1)).ttft_seconds == 2.0


def test_a_stream_without_tokens_has_no_gaps() -> None:
    assert stream(0.0).gaps() == []


def test_busy_from_the_first_request_to_the_last_token() -> None:
    assert busy_seconds([stream(1.0, (2.0, 1)), stream(1.5, (2.0, 1), (4.0, 1))]) == 3.0


def test_percentiles() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 50) == 3.0
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentiles_ms([0.001] * 99 + [1.0]) == {"p50": 1.0, "p90": 1.0, "p99": 10.99, "max": 1000.0}
    assert percentiles_ms([]) is None
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_median_and_spread() -> None:
    assert median_and_spread([3.0, 1.0, 2.00049]) == {"median": 2.0, "min": 1.0, "max": 3.0}

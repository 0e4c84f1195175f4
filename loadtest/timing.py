"""Times of streams and the figures made of them. One definition each, for benches, load tests and reports alike.

TTFT is from sending the request to its first token. ITL is every gap between two tokens of a stream: tokens that arrive
in one message have gaps of zero between them. E2E is from sending to the last message. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor
from statistics import median


@dataclass(slots=True)
class StreamTimes:
    """One stream as its reader saw it, in seconds on the reader's clock."""

    sent_at: float
    num_prompt: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When tokens arrived, and how many together."""
    ended_at: float = 0.0
    reason: str | None = None
    """Why it failed: the error's reason; None for a good end."""

    def arrived(self, now: float, num_tokens: int) -> None:
        """Notes new tokens; a message without any leaves no trace."""
        if num_tokens:
            self.arrivals.append((now, num_tokens))

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft_seconds(self) -> float:
        """Needs a first token."""
        return self.arrivals[0][0] - self.sent_at

    @property
    def e2e_seconds(self) -> float:
        """Needs an end."""
        return self.ended_at - self.sent_at

    def gaps(self) -> list[float]:
        """Every gap between two tokens, in order: one fewer than tokens."""
        found: list[float] = []
        before: float | None = None
        for now, count in self.arrivals:
            if before is not None:
                found.append(now - before)
            found.extend([0.0] * (count - 1))
            before = now
        return found


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated between neighbours. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    position = percent / 100 * (len(ordered) - 1)
    low, high = ordered[floor(position)], ordered[ceil(position)]
    return low + (high - low) * (position - floor(position))


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """{"p50": …, "p90": …, "p99": …, "max": …} in milliseconds; None of nothing."""
    if not seconds:
        return None
    shares = {f"p{percent}": percentile(seconds, percent) for percent in (50, 90, 99)}
    return {name: round(1_000 * value, 3) for name, value in (shares | {"max": max(seconds)}).items()}


def busy_seconds(streams: Sequence[StreamTimes]) -> float:
    """From the first request to the last token."""
    last = max(when for stream in streams for when, _ in stream.arrivals)
    return last - min(stream.sent_at for stream in streams)


def median_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the rounds, to three decimals."""
    return {"median": round(median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}

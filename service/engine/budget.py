"""How many prompt tokens a step may take while other streams wait for their next token.

A policy object: it sees counts and measured seconds, never sequences. A step that decodes takes about

    step_seconds = overhead_seconds + num_prefill * seconds_per_token

so the share that meets the target is (target - overhead) / seconds_per_token. The overhead is a median over the last
steps. A token's cost grows with the context before it, so that a median would always be late: it is that of the last
step, unless the two before it say more. A slow step (another process wanted the core) makes one share small, a quick
one none large. A stale overhead does no lasting harm: it enters both sides, so that the share settles where the
measured step meets the target, whatever the overhead is believed to be.
"""

from __future__ import annotations

from collections import deque
from statistics import median

OVERHEADS, COSTS = 9, 3
"""Measurements behind each."""
LEAST_FRACTION = 0.1
"""A prompt token costs at least this fraction of its even share of the step, however wrong the overhead is."""


class PrefillBudget:
    """Chooses the prefill share of each step from the steps before.

    `least_share` tokens are always given, so that prompts progress whatever decoding costs. `max_prefill_chunk` caps
    the share of every step, decoding or not.
    """

    def __init__(
        self, max_batch_tokens: int, least_share: int, target_itl_seconds: float, max_prefill_chunk: int | None = None
    ) -> None:
        if max_batch_tokens < 1 or least_share < 1:
            raise ValueError("a step has at least one token")
        if not target_itl_seconds > 0:
            raise ValueError("the inter-token target must be positive")
        if max_prefill_chunk is not None and max_prefill_chunk < 1:
            raise ValueError("a prefill chunk has at least one token")
        self._most = min(max_batch_tokens, max_prefill_chunk or max_batch_tokens)
        self._max_batch_tokens = max_batch_tokens
        self._least = min(least_share, self._most)
        self._target_seconds = target_itl_seconds
        self._overheads: deque[float] = deque(maxlen=OVERHEADS)
        self._costs: deque[float] = deque(maxlen=COSTS)
        self._share = self._least

    def share(self, num_decoding: int) -> int:
        """Prefill tokens of the next step, beside `num_decoding` rows of one token each."""
        if num_decoding == 0:
            return self._most
        return max(0, min(self._share, self._max_batch_tokens - num_decoding))

    def observe(self, num_decoding: int, num_prefill: int, step_seconds: float) -> None:
        """Learns from a step that took this long."""
        if num_prefill == 0:
            self._overheads.append(step_seconds)
        else:
            overhead = self._overhead_seconds if num_decoding else 0.0
            beyond = max(step_seconds - overhead, step_seconds * LEAST_FRACTION)
            self._costs.append(beyond / num_prefill)
        self._share = self._best_share()

    @property
    def _overhead_seconds(self) -> float:
        return median(self._overheads) if self._overheads else 0.0

    def _best_share(self) -> int:
        """The share that meets the target; the least one while a prompt token's cost is unknown."""
        cost = max(median(self._costs), self._costs[-1]) if self._costs else 0.0
        if cost <= 0.0:
            return self._least
        spare = self._target_seconds - self._overhead_seconds
        return int(max(self._least, min(self._most, spare / cost)))

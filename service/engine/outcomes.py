"""What happened since the last report: outcomes in columns, and counters.

Written by the scheduler, taken by the engine. It does not know why anything happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from model.interface import TokenLogprobs
from service.engine.messages import Start


@dataclass(slots=True)
class Outcomes:
    """New tokens and ends, in the columns of a Report. Entry i of every list but `starts` belongs to ids[i]."""

    ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finishes: list[int] = field(default_factory=list)
    preemptions: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)

    def add(
        self, sequence_id: int, token_id: int, finish: int, num_preemptions: int, logprobs: TokenLogprobs | None
    ) -> None:
        """A new token, an end (`finish` is its FinishCode), or both."""
        self.ids.append(sequence_id)
        self.token_ids.append(token_id)
        self.finishes.append(finish)
        self.preemptions.append(num_preemptions)
        self.logprobs.append(logprobs)

    def __bool__(self) -> bool:
        return bool(self.ids or self.starts)


@dataclass(slots=True)
class Counters:
    """What only grows between two reports; the fields are those of StepStats."""

    num_preemptions: int = 0
    recomputed_tokens: int = 0
    dropped_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0

"""One sequence: its tokens, how far they are computed, and which slot and blocks it holds.

Only the scheduler writes it. It knows neither the pool nor the runner. Its one subtlety is that a token can exist
before its value is known, because the step that draws it is still in flight:

    token_ids           | prompt .........| generated ...|
                        0      num_prompt ^              ^ len(token_ids)
    being drawn                                          |- - -|
                                                               ^ num_tokens = len(token_ids) + num_drawing <= max_tokens
    num_computed        | keys and values exist, or will when the steps in flight end |   never beyond num_tokens
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from model.interface import Admission, Sampling
from service.engine.messages import FinishCode, Limits, Submit

NO_SLOT = -1


class State(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    """To be recomputed, but a step in flight still uses its blocks."""
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's view of a request. `rank` orders sequences: the smaller goes first and is preempted last."""

    id: int
    token_ids: list[int]
    num_prompt: int
    sampling: Sampling
    limits: Limits
    end_token_ids: frozenset[int]
    cache_root: bytes | None
    rank: tuple[float, ...]
    num_tokens: int
    """Tokens that exist, those in flight included."""
    max_tokens: int
    """Prompt and new ones, when it ends for its length."""
    state: State = State.WAITING
    finish: FinishCode = FinishCode.NONE
    has_started: bool = False
    slot: int = NO_SLOT
    num_computed: int = 0
    num_in_flight: int = 0
    """Steps in flight that hold a row of this sequence."""
    block_table: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Names of the leading full blocks, as far as they were needed; they stay true across preemptions."""
    num_published: int = 0
    """Leading blocks of the table that the prefix cache has been told of, or came from it."""
    num_preemptions: int = 0

    @staticmethod
    def from_submit(submit: Submit, rank: tuple[float, ...]) -> Sequence:
        """A waiting sequence with its own copy of the tokens."""
        return Sequence(
            id=submit.id,
            token_ids=list(submit.token_ids),
            num_prompt=submit.num_prompt,
            sampling=submit.sampling,
            limits=submit.limits,
            end_token_ids=frozenset(submit.limits.end_token_ids),
            cache_root=submit.cache_root,
            rank=rank,
            num_tokens=len(submit.token_ids),
            max_tokens=submit.num_prompt + submit.limits.max_new_tokens,
        )

    @property
    def num_drawing(self) -> int:
        """Tokens that steps in flight draw."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that steps still have to compute. The very last token never is: nothing would read it."""
        return self.num_tokens - self.num_computed if self.num_tokens < self.max_tokens else 0

    def admission(self) -> Admission:
        """What the runner must know when this sequence takes a slot."""
        assert self.num_drawing == 0, "a sequence is admitted with all its tokens known"
        return Admission(
            token_ids=tuple(self.token_ids),
            num_prompt=self.num_prompt,
            sampling=self.sampling,
            min_new_tokens=self.limits.min_new_tokens,
            end_token_ids=self.limits.end_token_ids,
        )

    def accept(self, token_id: int) -> FinishCode | None:
        """Takes the value of the token drawn first among those in flight; returns how it ends the sequence, if so."""
        token_ids = self.token_ids
        token_ids.append(token_id)
        if token_id in self.end_token_ids and len(token_ids) > self.num_prompt + self.limits.min_new_tokens:
            return FinishCode.STOP_TOKEN
        return FinishCode.LENGTH if len(token_ids) >= self.max_tokens else None

"""What crosses the socket between a front end and the engine: integers, typed, no text, no pickle.

Frames are a 4-byte little-endian length followed by one MessagePack message (msgspec; unknown or ill-typed messages do
not decode). Times are seconds on the machine's monotonic clock, which all processes share. A report is columnar:
parallel lists cost microseconds for 64 rows where as many objects would cost hundreds.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from model.interface import ModelFacts, RunnerShape, Sampling, TokenLogprobs

NO_TOKEN = -1
MAX_FRAME_BYTES = 64 * 2**20


class FinishCode(IntEnum):
    """How a sequence ended, as the engine sees it; the front end adds stop strings."""

    NONE = 0
    STOP_TOKEN = 1
    LENGTH = 2
    CANCELLED = 3
    DEADLINE = 4
    NON_FINITE = 5
    REFUSED = 6
    """The engine will not index with what it was sent: a front end that validates never sees it."""


NOT_ENDED = int(FinishCode.NONE)
"""What a report says of a sequence that goes on; a plain integer, because it stands there for nearly every token."""


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """When a sequence must end and how urgent it is. `end_token_ids` end it (empty with ignore_eos and no stop ids)."""

    max_new_tokens: int
    min_new_tokens: int
    end_token_ids: tuple[int, ...]
    deadline: float
    arrival: float
    priority: int = 0


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Start a sequence. `token_ids` are the prompt and, after an engine restart, what was generated before it.

    `cache_root` seeds the prefix digests (tenant, salt); None bypasses the prefix cache. `wants_each_token` keeps its
    tokens from being held: the front end may end it for any of them, as for a stop string.
    """

    id: int
    token_ids: list[int]
    num_prompt: int
    sampling: Sampling
    limits: Limits
    cache_root: bytes | None
    wants_each_token: bool = False


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """End these sequences; each is answered by one CANCELLED in a report unless it had ended already."""

    ids: list[int]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """First message of an engine to a front end: it is ready, and this is what it runs."""

    facts: ModelFacts
    shape: RunnerShape


class Start(msgspec.Struct, frozen=True, array_like=True):
    """A sequence was scheduled for the first time."""

    id: int
    scheduled_at: float
    num_cached: int


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """State after a step, and what changed since the report before."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    """Blocks that hold only reusable prefixes; allocatable like free ones."""
    num_rows: int = 0
    num_tokens: int = 0
    num_sampled: int = 0
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    num_preemptions: int = 0
    recomputed_tokens: int = 0
    """Tokens whose keys and values were thrown away by preemption."""
    dropped_tokens: int = 0
    """Tokens computed for sequences that had ended meanwhile."""
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0


class Report(msgspec.Struct, frozen=True, array_like=True, tag="report"):
    """Everything one step produced for one front end; entry i of ids, token_ids, finishes belongs together.

    `token_ids[i]` is NO_TOKEN where a sequence ended without a new token. `logprobs` is empty or as long as `ids`.
    `preemptions[i]` counts how often the sequence was preempted so far. `ended_at` is when the tokens were drawn, some
    time before the report arrives; it means nothing where there are none.
    """

    ids: list[int]
    token_ids: list[int]
    finishes: list[int]
    preemptions: list[int]
    logprobs: list[TokenLogprobs | None]
    starts: list[Start]
    ended_at: float
    stats: StepStats


ToEngine = Submit | Cancel
FromEngine = Hello | Report

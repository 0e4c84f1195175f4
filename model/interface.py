"""What an engine says to a runner, and what it hears back.

This is the whole border between policy (service/engine) and tensors (model): plain data and one Protocol, standard
library only. It does not know how a step is computed, nor why the rows were chosen.

A runner keeps per-slot state (token ids, block table, sampling parameters), so a step sends only what changed:

    tokens[slot]      | prompt ...............| generated ...|
                      0            num_prompt ^              ^ known so far
    row of one step          [start, start + num_tokens)       computed by this step
    wants_token       start + num_tokens == known so far       the step also draws the token at that position
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

NO_LOGPROBS = -1
MAX_LOGIT_BIAS = 1024
"""Entries of one sequence."""
MAX_STOP_TOKEN_IDS, MAX_EOS_TOKEN_IDS = 64, 64
"""That a request names, and that a model has."""
MAX_END_TOKEN_IDS = MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS
"""Of one sequence."""
MAX_THREADS = 255
"""That compute together: the kernels' team has room for so many (model/native/team.h)."""
CPU_BLOCK_SIZE = 16
CPU_KV_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Every field is final: defaults were filled and ranges checked at the door.

    temperature 0 is greedy. `num_logprobs` is NO_LOGPROBS for none, else how many alternatives stand beside the chosen
    token's log-probability. The draw at position p depends on (seed, p) and the row's own logits only.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    num_logprobs: int = NO_LOGPROBS

    @property
    def counts_output(self) -> bool:
        """Whether a penalty depends on how often the output holds a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before."""
        return self.repetition_penalty != 1 or self.counts_output


@dataclass(frozen=True, slots=True)
class Admission:
    """Everything a runner must know when a sequence takes a slot, first or again after preemption.

    `token_ids` are all known tokens (prompt, then what was generated before a preemption). While fewer than
    `min_new_tokens` tokens follow the first `num_prompt`, the tokens in `end_token_ids` cannot be drawn.
    """

    token_ids: Sequence[int]
    num_prompt: int
    sampling: Sampling
    min_new_tokens: int = 0
    end_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Row:
    """One sequence's share of one step: compute positions [start, start + num_tokens).

    `new_block_ids` extend the slot's block table (they follow those sent before; an admission empties the table first).
    Nobody writes to one. It is not frozen, because hundreds are made in every step and a frozen one takes five times as
    long to make.
    """

    slot: int
    start: int
    num_tokens: int
    new_block_ids: Sequence[int] = ()
    wants_token: bool = False
    admission: Admission | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """All rows of one step."""

    rows: Sequence[Row]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, of the model's own distribution (before any sampling parameter)."""

    chosen: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step drew: columns, one entry per row that wanted a token, in the batch's order.

    `is_finite[i]` is False where the row's logits held a NaN or were infinite everywhere: its token id is meaningless.
    `logprobs` is empty when no row asked for any.
    """

    token_ids: list[int] = field(default_factory=list)
    is_finite: list[bool] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


class Pending(Protocol):
    """A step under way."""

    def result(self) -> Sampled:
        """Waits for the step to end and returns what it drew."""


@dataclass(frozen=True, slots=True)
class RunnerShape:
    """The sizes an engine plans with."""

    num_blocks: int
    block_size: int
    num_slots: int
    context_length: int
    vocab_size: int
    max_batch_tokens: int
    runs_ahead: bool = False
    """Whether `launch` returns before its step is done, so that it pays to launch the next one meanwhile."""
    max_generated_tokens: int | None = None
    """Tokens behind their sequences' prompts that a step has at most; at least `num_slots`. None: as many as there are.

    A runner that says a number computes them in another way than prompts, whose keys and values may have other bits:
    blocks of the one kind must not serve as the other.
    """


class Runner(Protocol):
    """Computes steps. Steps are computed in launch order; slots and blocks may be reused once their step has ended."""

    @property
    def shape(self) -> RunnerShape: ...

    def launch(self, batch: Batch) -> Pending:
        """Starts a step and returns; on a device it returns before the step is done."""


class Dtype(StrEnum):
    """Precision of weights, activations and cache."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Quantization(StrEnum):
    """What the weights of the matrices are kept as."""

    NONE = "none"
    INT8 = "int8"


class Backend(StrEnum):
    """What computes a step: a card, the kernels compiled for a CPU, or torch's operators."""

    AUTO = "auto"
    GPU = "gpu"
    NATIVE = "native"
    TORCH = "torch"


class GpuAttention(StrEnum):
    """What computes attention on a card."""

    TRITON = "triton"
    FLASH_ATTENTION_3 = "flash-attention-3"


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a runner is built from. `model_dir` is a Hugging Face directory."""

    model_dir: str
    dtype: Dtype = Dtype.BFLOAT16
    quantization: Quantization = Quantization.NONE
    backend: Backend = Backend.AUTO
    """AUTO is GPU where torch has a card for it, else NATIVE where the kernels were built and take the model."""
    cpu_level: str | None = None
    """Instruction set level of the kernels; None for the fastest one that runs here."""
    block_size: int | None = None
    """None for what suits the backend: CPU_BLOCK_SIZE, and more on a card."""
    kv_cache_bytes: int | None = None
    """None for CPU_KV_CACHE_BYTES, on a card for what is free there."""
    num_blocks: int | None = None
    """Overrides kv_cache_bytes; tests use it for small pools."""
    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    context_length: int | None = None
    """Shortens the model's own context."""
    num_threads: int | None = None
    """None for what the process may use, one less where that is four or more; MAX_THREADS at most."""
    pins_threads: bool | None = None
    """Tie threads to CPUs; None does where num_threads is None, with four CPUs or more and no quota."""
    captures_graphs: bool = True
    """On a card, replay steps as CUDA graphs; otherwise each launches its kernels one by one."""
    gpu_attention: GpuAttention = GpuAttention.TRITON
    """TRITON is our own, whose rows keep their bits."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What callers may know about the loaded model; filled while it loads."""

    architecture: str
    digest: str
    dtype: str
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    quantization: str
    backend: str
    """What computes: "gpu", "native", "torch"."""
    cpu_level: str
    """The kernels' instruction set level; empty where none of the CPU's compute."""
    num_threads: int
    has_tied_threads: bool = False
    """Whether each of them, but for the engine's own, keeps to a CPU."""
    card: str = ""
    """The name of the card that computes."""
    attention: str = ""
    """What computes attention there, if not our own kernels: "flash-attention-3"."""
    default_temperature: float = 1.0
    default_top_k: int = 0
    default_top_p: float = 1.0
    default_repetition_penalty: float = 1.0
    default_max_tokens: int | None = None

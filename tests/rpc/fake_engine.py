"""An engine client without an engine: it plays a script of tokens, as far and as fast as the test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.interface import NO_LOGPROBS, ModelFacts, RunnerShape, TokenLogprobs
from service.engine.messages import FinishCode, Hello, Start, StepStats, Submit
from service.generation import Generation


def hello(context_length: int = 1024, num_blocks: int = 1024, vocab_size: int = 4096, **facts: object) -> Hello:
    """Sizes of the built-in model unless the test says otherwise."""
    known = {
        "architecture": "LlamaForCausalLM",
        "digest": "sha256:0123",
        "dtype": "bfloat16",
        "context_length": context_length,
        "vocab_size": vocab_size,
        "eos_token_ids": (2,),
        "num_parameters": 2_400_000,
        "weight_bytes": 4_800_000,
        "kv_bytes_per_token": 2048,
        "quantization": "none",
        "backend": "native",
        "cpu_level": "v3",
        "num_threads": 2,
    }
    shape = RunnerShape(
        num_blocks=num_blocks,
        block_size=16,
        num_slots=64,
        context_length=context_length,
        vocab_size=vocab_size,
        max_batch_tokens=512,
    )
    return Hello(ModelFacts(**known | facts), shape)  # type: ignore[arg-type]


@dataclass(eq=False)
class FakeSequence:
    """One submitted sequence."""

    submit: Submit
    listener: Generation
    started_at: float | None = None
    num_tokens: int = 0

    @property
    def is_started(self) -> bool:
        return self.started_at is not None


@dataclass
class FakeEngine:
    """Called with the callbacks, as EngineClient is. Tokens come one per turn of the event loop.

    `max_started` sequences run, the others stay queued; each pauses once it has `pause_at` tokens; `script` repeats.
    """

    script: Sequence[int] = (1,)
    max_started: int | None = None
    pause_at: int | None = None
    starts_up: bool = True
    greeting: Hello = field(default_factory=hello)
    finish_code: FinishCode = FinishCode.LENGTH
    num_cached: int = 0
    preemptions: int = 0
    token_seconds: float | None = None
    """Between the times at which tokens are said to have been drawn; None for when they are told."""

    def __post_init__(self) -> None:
        self.sequences: dict[int, FakeSequence] = {}
        self.submitted: list[Submit] = []
        self.cancelled: list[int] = []
        self.is_up = False
        self._changed = asyncio.Event()

    def __call__(
        self,
        *,
        on_up: Callable[[Hello], None],
        on_down: Callable[[], None],
        on_stats: Callable[[StepStats], None],
    ) -> FakeEngine:
        self._on_up, self._on_down, self.on_stats = on_up, on_down, on_stats
        return self

    async def run(self) -> None:
        if self.starts_up:
            self.up()
        while True:
            self._changed.clear()
            while self._step():  # noqa: ASYNC110 (a turn of the loop per token)
                await asyncio.sleep(0)
            await self._changed.wait()

    def submit(self, submit: Submit, listener: Generation) -> None:
        self.submitted.append(submit)
        self.sequences[submit.id] = FakeSequence(submit, listener)
        self._changed.set()

    def cancel(self, sequence_id: int) -> None:
        self.cancelled.append(sequence_id)
        if not self.is_up and sequence_id in self.sequences:  # as EngineClient: nobody is there to confirm it
            self._finish(self.sequences[sequence_id], FinishCode.CANCELLED)
        self._changed.set()

    def resume(self, pause_at: int | None = None, max_started: int | None = None) -> None:
        """Lets sequences go on, to another pause or to their end."""
        self.pause_at, self.max_started = pause_at, max_started
        self._changed.set()

    def up(self) -> None:
        self.is_up = True
        self._on_up(self.greeting)
        self._changed.set()

    def die(self, is_recoverable: bool) -> None:
        """The engine is gone. When it is not recoverable, its sequences are lost."""
        self.is_up = False
        self._on_down()
        if not is_recoverable:
            lost, self.sequences = list(self.sequences.values()), {}
            for sequence in lost:
                sequence.listener.on_lost()

    def _step(self) -> bool:
        """One token for each sequence that may go on. False when nothing moved."""
        moved = False
        if not self.is_up:
            return False
        for sequence in list(self.sequences.values()):
            if sequence.submit.id in self.cancelled:
                self._finish(sequence, FinishCode.CANCELLED)
                moved = True
            elif self._may_run(sequence):
                self._advance(sequence)
                moved = True
        return moved

    def _may_run(self, sequence: FakeSequence) -> bool:
        num_started = sum(other.is_started for other in self.sequences.values())
        if not sequence.is_started:
            return self.max_started is None or num_started < self.max_started
        return self.pause_at is None or sequence.num_tokens < self.pause_at

    def _advance(self, sequence: FakeSequence) -> None:
        submit, listener = sequence.submit, sequence.listener
        if not sequence.is_started:
            sequence.started_at = time.monotonic()
            listener.on_start(Start(submit.id, sequence.started_at, self.num_cached))
            return
        token_id = self.script[sequence.num_tokens % len(self.script)]
        sequence.num_tokens += 1
        drawn_at = time.monotonic()
        if self.token_seconds is not None:
            drawn_at = sequence.started_at + sequence.num_tokens * self.token_seconds
        listener.on_token(token_id, self._logprobs(submit, token_id), self.preemptions, drawn_at)
        self.on_stats(StepStats(num_running=len(self.sequences), num_rows=1, num_tokens=1, num_sampled=1))
        limits = submit.limits
        if token_id in limits.end_token_ids and sequence.num_tokens > limits.min_new_tokens:
            self._finish(sequence, FinishCode.STOP_TOKEN)
        elif sequence.num_tokens == limits.max_new_tokens:
            self._finish(sequence, self.finish_code)

    def _logprobs(self, submit: Submit, token_id: int) -> TokenLogprobs | None:
        count = submit.sampling.num_logprobs
        if count == NO_LOGPROBS:
            return None
        return TokenLogprobs(-0.5, list(range(count)), [-0.5 - rank for rank in range(count)])

    def _finish(self, sequence: FakeSequence, code: FinishCode) -> None:
        # Out of the table first: a listener may cancel, and what has ended cannot be.
        self.sequences.pop(sequence.submit.id, None)
        sequence.listener.on_finish(code, self.preemptions)

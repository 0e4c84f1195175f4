"""Owns the loop: schedule, launch, commit, report. Everything else it delegates.

It knows no sockets and no tensors: a runner computes steps, whoever calls `step` delivers the reports.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from model.interface import Batch, Pending, Runner
from service.engine.block_pool import BlockPool
from service.engine.budget import PrefillBudget
from service.engine.guard import is_sound
from service.engine.messages import FinishCode, Report, StepStats, Submit
from service.engine.policy import urgency
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence

NO_STEP = StepStats()


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine runs its loop."""

    depth: int = 0
    """Steps launched ahead of the one being committed: 1 keeps a device busy, 0 is for a CPU."""
    prefix_cache: bool = True
    """Reuse the keys and values of common prefixes."""
    target_itl_seconds: float = 0.05
    """Prefill shares shrink so that running streams wait about this long between tokens."""
    max_prefill_chunk: int | None = None
    """Prompt tokens of one step at most, whatever the target; None leaves it to the target."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step in flight."""

    batch: Batch
    pending: Pending
    launched_at: float


class Engine:
    """Sequences in, reports out; `step` is one turn of the loop. `clock` gives monotonic seconds."""

    def __init__(self, runner: Runner, options: EngineOptions, clock: Callable[[], float] = time.monotonic) -> None:
        if options.depth not in (0, 1):
            raise ValueError("an engine runs at most one step ahead")
        shape = runner.shape
        budget = PrefillBudget(
            shape.max_batch_tokens, shape.block_size, options.target_itl_seconds, options.max_prefill_chunk
        )
        pool = BlockPool(shape.num_blocks, shape.block_size, keeps_apart=shape.max_generated_tokens is not None)
        self.scheduler = Scheduler(
            pool, budget, shape.num_slots, shape.max_batch_tokens, max_generated_tokens=shape.max_generated_tokens
        )
        self._runner = runner
        self._options = options
        self._clock = clock
        self._in_flight: deque[Step] = deque()
        self._committed_at = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work

    @property
    def expects_prompts(self) -> bool:
        """Whether the step launched last or the next one has a part of a prompt: such a step may last long."""
        return self.scheduler.expects_prompts

    def submit(self, submit: Submit) -> None:
        """Takes a sequence. One that cannot be run, or whose id is in use, ends as REFUSED in the next report."""
        if submit.id in self.scheduler:
            self.scheduler.end([submit.id], FinishCode.REFUSED)
        elif is_sound(submit, self._runner.shape):
            sequence = Sequence.from_submit(submit, urgency(submit.limits))
            if not self._options.prefix_cache:
                sequence.cache_root = None
            self.scheduler.add(sequence)
        else:
            self.scheduler.refuse(submit.id)

    def cancel(self, sequence_ids: Iterable[int]) -> None:
        """Ends sequences. Each that has not ended yet is CANCELLED in the next report."""
        self.scheduler.end(sequence_ids, FinishCode.CANCELLED)

    def step(self) -> Report | None:
        """One turn of the loop; None when there is nothing to do."""
        if not self.has_work:
            return None
        started_at = self._clock()
        batch = self.scheduler.schedule(started_at)
        launched_at = self._clock()
        if batch.rows:
            self._in_flight.append(Step(batch, self._runner.launch(batch), launched_at))
        ended = None
        if len(self._in_flight) > (self._options.depth if batch.rows else 0):
            ended = self._commit(self._in_flight.popleft())
        assert batch.rows or ended or self.scheduler.has_outcomes, "work is left, but no step can do it"
        report = self._report(ended, launched_at - started_at)
        if not self.has_work:
            self.scheduler.check_idle()
        return report

    def _commit(self, step: Step) -> StepStats:
        """Waits for a step to end and takes it in. Returns what the step itself tells for the statistics."""
        sampled = step.pending.result()
        now = self._clock()
        # Ahead of its turn, a step waits for the one before; that wait is not its own time.
        seconds = now - max(step.launched_at, self._committed_at)
        self._committed_at = now
        self.scheduler.commit(step.batch, sampled)
        num_decoding = [row.num_tokens for row in step.batch.rows].count(1)
        self.scheduler.budget.observe(num_decoding, step.batch.num_tokens - num_decoding, seconds)
        return StepStats(
            num_rows=len(step.batch.rows),
            num_tokens=step.batch.num_tokens,
            num_sampled=len(sampled.token_ids),
            step_seconds=seconds,
        )

    def _report(self, ended: StepStats | None, schedule_seconds: float) -> Report:
        """Everything since the report before."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        outcomes, counters = scheduler.take()
        ended = ended or NO_STEP
        stats = StepStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            free_blocks=pool.num_allocatable - pool.num_cached,
            cached_blocks=pool.num_cached,
            num_rows=ended.num_rows,
            num_tokens=ended.num_tokens,
            num_sampled=ended.num_sampled,
            step_seconds=ended.step_seconds,
            schedule_seconds=schedule_seconds,
            num_preemptions=counters.num_preemptions,
            recomputed_tokens=counters.recomputed_tokens,
            dropped_tokens=counters.dropped_tokens,
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
        )
        return Report(
            ids=outcomes.ids,
            token_ids=outcomes.token_ids,
            finishes=outcomes.finishes,
            preemptions=outcomes.preemptions,
            logprobs=outcomes.logprobs if any(outcomes.logprobs) else [],
            starts=outcomes.starts,
            ended_at=self._committed_at,
            stats=stats,
        )

"""Whole steps of a model through its runner, as the engine launches them: decode at several batches, and prompts.

    python -m loadtest.gpu.steps --records FILE --model 8B --models DIR

A decode step counts from one step's tokens being there to the next one's, one step ahead as the engine runs a device,
and alone, where the host waits for each step before it launches the next: the difference is the host's share.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from loadtest.gpu.limits import rates_of
from loadtest.gpu.records import PartOptions, parse_part
from loadtest.gpu.shapes import cost_of, shape_of
from loadtest.models import ModelShape
from loadtest.roofline import decode_step_seconds, least_time
from loadtest.workloads import Work, uniform_works
from model.interface import Admission, Batch, Dtype, ModelFacts, Pending, Row, Runner, RunnerOptions, Sampling
from model.runner import load_runner

PRECISION = "bf16"
CARD_BACKEND = "gpu"
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    batches: tuple[int, ...]
    context: int
    """Of each row, before the first step that is measured."""
    num_steps: int
    num_warm_up: int
    prompts: tuple[int, ...]
    repeats: int
    """Of each prompt."""
    max_batch_tokens: int
    context_length: int


PLAN = Plan((1, 8, 32, 64, 128, 256), 960, 64, 8, (1024, 8192, 32_768), 5, 8192, 40_960)
DRY_PLAN = Plan((1, 2), 12, 4, 1, (40,), 2, 32, 256)


class Driver:
    """Launches steps over sequences that it places in slots and blocks itself."""

    def __init__(self, runner: Runner, plan: Plan, vocab_size: int) -> None:
        self._runner, self._plan = runner, plan
        self._vocab_size = vocab_size
        self._num_computed = [0] * runner.shape.num_slots
        self._first_free = 0

    def admit(self, slots: Sequence[int], num_tokens: int, room: int, seed: int) -> float:
        """Computes prompts of `num_tokens` each, with blocks for `room` more, and draws each one's first token.

        Returns the seconds from the first launch to the last result. What was in the pool before is given up.
        """
        works = uniform_works(seed, len(slots), num_tokens, 1, self._vocab_size)
        self._first_free = 0
        tables = [self._blocks(num_tokens + room) for _ in slots]
        admissions = [Admission(work.prompt, num_tokens, GREEDY) for work in works]
        started_at = time.perf_counter()
        pending: list[Pending] = []
        for slot, table, admission in zip(slots, tables, admissions, strict=True):
            for row in prompt_rows(slot, table, admission, self._plan.max_batch_tokens):
                pending.append(self._runner.launch(Batch([row], row.num_tokens)))
                if len(pending) > 1:
                    pending.pop(0).result()
            self._num_computed[slot] = num_tokens
        pending.pop().result()
        return time.perf_counter() - started_at

    def decode(self, slots: Sequence[int], num_steps: int, depth: int) -> list[float]:
        """Steps of one token for each slot, `depth` ahead. Returns when each step's tokens were there."""
        ends: list[float] = []
        pending: list[Pending] = []
        for _ in range(num_steps):
            rows = [Row(slot, self._num_computed[slot], 1, wants_token=True) for slot in slots]
            pending.append(self._runner.launch(Batch(rows, len(rows))))
            for slot in slots:
                self._num_computed[slot] += 1
            if len(pending) > depth:
                pending.pop(0).result()
                ends.append(time.perf_counter())
        for step in pending:
            step.result()
            ends.append(time.perf_counter())
        return ends

    def contexts(self, slots: Sequence[int]) -> list[int]:
        """Positions that each slot's next token will see."""
        return [self._num_computed[slot] + 1 for slot in slots]

    def _blocks(self, num_tokens: int) -> range:
        first = self._first_free
        self._first_free = first - -num_tokens // self._runner.shape.block_size
        return range(first, self._first_free)


def prompt_rows(slot: int, table: Sequence[int], admission: Admission, max_tokens: int) -> Iterator[Row]:
    """A prompt in parts of at most `max_tokens`."""
    num_tokens = admission.num_prompt
    for start in range(0, num_tokens, max_tokens):
        count = min(max_tokens, num_tokens - start)
        is_first, is_last = start == 0, start + count == num_tokens
        yield Row(
            slot,
            start,
            count,
            new_block_ids=table if is_first else (),
            wants_token=is_last,
            admission=admission if is_first else None,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes. Returns the exit code."""
    options = parse_part("steps", arguments)
    plan = DRY_PLAN if options.is_dry else PLAN
    shape = shape_of(options.model, options.is_dry)
    driver = Driver(load(options, plan), plan, shape.vocab_size)
    measure_prompts(options, plan, shape, driver)
    measure_decode(options, plan, shape, driver)
    return 0


def load(options: PartOptions, plan: Plan) -> Runner:
    """The model's runner. Raises ValueError where it does not compute on the card."""
    started_at = time.monotonic()
    runner, facts = load_runner(
        RunnerOptions(
            model_dir=str(options.models / options.model),
            dtype=Dtype.BFLOAT16,
            max_num_seqs=max(plan.batches),
            max_batch_tokens=plan.max_batch_tokens,
            context_length=plan.context_length,
        )
    )
    seconds = time.monotonic() - started_at
    options.records.write("loaded", model=options.model, backend=facts.backend, seconds=seconds)
    check_backend(facts, options.is_dry)
    return runner


def check_backend(facts: ModelFacts, is_dry: bool) -> None:
    """Raises ValueError where something else than the card computes, outside of a dry run."""
    if not is_dry and facts.backend != CARD_BACKEND:
        raise ValueError(f"the model was loaded for the {facts.backend} backend, not for the card")


def measure_prompts(options: PartOptions, plan: Plan, shape: ModelShape, driver: Driver) -> None:
    """One prompt at a time, from its launch to its first token."""
    cost, rates = cost_of(shape), rates_of(options)
    for num_tokens in plan.prompts:
        seconds = [driver.admit([0], num_tokens, 1, seed) for seed in range(plan.repeats + 1)][1:]
        least = least_time(cost, rates, PRECISION, [Work((1,) * num_tokens, 1)]).prefill_seconds
        options.records.write(
            "prefill",
            model=options.model,
            tokens=num_tokens,
            ms=1e3 * median(seconds),
            limit_ms=1e3 * least,
            share=least / median(seconds),
            noise=max(seconds) / min(seconds) - 1,
        )


def measure_decode(options: PartOptions, plan: Plan, shape: ModelShape, driver: Driver) -> None:
    """Every batch, on sequences whose contexts are about the plan's."""
    cost, rates = cost_of(shape), rates_of(options)
    for batch in plan.batches:
        slots = range(batch)
        num_steps = plan.num_warm_up + plan.num_steps
        driver.admit(slots, plan.context, 3 * num_steps + 1, seed=batch)
        first, second = (median_gap(driver.decode(slots, num_steps, 1), plan.num_warm_up) for _ in range(2))
        contexts = [context - (num_steps + plan.num_steps) // 2 for context in driver.contexts(slots)]
        alone = median_gap(driver.decode(slots, num_steps, 0), plan.num_warm_up)
        least, seconds = decode_step_seconds(cost, rates, PRECISION, contexts), min(first, second)
        options.records.write(
            "decode",
            model=options.model,
            batch=batch,
            context=contexts[0],
            ms=1e3 * seconds,
            limit_ms=1e3 * least,
            share=least / seconds,
            noise=abs(first - second) / seconds,
            alone_ms=1e3 * alone,
            tokens_per_second=batch / seconds,
        )


def median_gap(ends: Sequence[float], num_warm_up: int) -> float:
    """Between the ends of two steps, after the first ones."""
    return median(right - left for left, right in pairwise(ends[num_warm_up:]))


if __name__ == "__main__":
    sys.exit(main())

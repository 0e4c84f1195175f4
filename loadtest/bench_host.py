"""What the host does for a step, by phase: the engine, its loop and its runner, over steps that compute nothing.

    python -m loadtest.bench_host [--runners card none] [--loads decode prompts churn] [--rows 1 8 32 64 128 256]
        [--depths 0 1] [--block-sizes 16 64] [--step-ms 1.0] [--steps 300] [--rounds 5]

Everything but the device is the engine process's own: commands and reports cross a socket, whose far end is played
between two turns of the loop and not measured. `card` is the runner for a card, over a device that does nothing: rows
are read, planned and packed, patches made, results taken (needs triton). What a card's own driver takes of the host is
not in it: a copy to the device, a copy back with its events, two graphs replayed; and, in steps of more than 1,024
tokens beside which none of it matters, the launches of all their kernels. `none` only makes up what was drawn.

Steps take `--step-ms` on the clock, asleep: what is held for readers goes out as often as it would, and the caches are
as cold as others left them. `decode`: all rows decode. `prompts`: beside them one prompt at a time is computed, a chunk
each step. `churn`: prompts of 16 to 512 tokens and answers of 16 to 128, each followed by another as it ends.

Figures are microseconds per turn: of each phase the mean, of all together also the median and the 99th percentile;
turns in which the kernel gave the core to others are left out. Of these the median over the rounds, with the least and
the largest. The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from loadtest.host_loop import MeasuredLoop, NoRunner, StepClock, Turn
from loadtest.machine import cpu_times, describe, noise, others_share
from loadtest.timing import median_and_spread, percentile
from loadtest.workloads import Work, random_prompt
from model.interface import Runner, RunnerShape
from service.engine.engine import EngineOptions

VOCAB_SIZE = 128_256
CONTEXT_LENGTH = 8_192
MAX_BATCH_TOKENS = 2_048
CHUNK = 512
NUM_DECODED = 4_096
"""New tokens of a sequence that is to decode all the time: no more turns are measured."""
SETTLING_TURNS = 30

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    runner: str
    load: str
    rows: int
    depth: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures."""

    cases: tuple[Case, ...]
    step_seconds: float
    steps: int
    rounds: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns the exit code."""
    plan = parse(arguments)
    before = cpu_times()
    results = []
    for case in plan.cases:
        results.append({**asdict(case), "microseconds": measure(case, plan)})
        show(results[-1])
    others = others_share(before, cpu_times())
    if warning := noise(others):
        print(warning, file=sys.stderr)
    document = {
        "bench": "the host's share of a step",
        "machine": describe(),
        "others_share": round(others, 3),
        "step_ms": 1_000 * plan.step_seconds,
        "steps": plan.steps,
        "rounds": plan.rounds,
        "results": results,
    }
    print(json.dumps(document))
    return 0


def parse(arguments: Sequence[str] | None) -> Plan:
    """The command line. Exits with 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256], help="sequences at once")
    parser.add_argument("--depths", type=int, nargs="+", choices=(0, 1), default=[0, 1], help="steps ahead")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 64], help="positions of a block")
    parser.add_argument("--step-ms", type=float, default=1.0, help="what a step takes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="turns of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    given = parser.parse_args(arguments)
    if min(given.steps, given.rounds, *given.rows, *given.block_sizes) < 1 or given.step_ms < 0:
        parser.error("rows, block sizes, steps and rounds must be at least 1, a step's time not negative")
    if "card" in given.runners and importlib.util.find_spec("triton") is None:
        parser.error("the runner for a card needs triton, which is not installed: --runners none")
    if given.steps * given.rounds > NUM_DECODED // 2:
        parser.error(f"steps times rounds must be at most {NUM_DECODED // 2}")
    cases = itertools.starmap(
        Case, itertools.product(given.runners, given.loads, given.rows, given.depths, given.block_sizes)
    )
    return Plan(tuple(cases), given.step_ms / 1_000, given.steps, given.rounds)


def measure(case: Case, plan: Plan) -> dict[str, dict[str, float]]:
    """All rounds of one case, one after the other in one engine: median and spread of each figure."""
    blocks_per_sequence = -(-CONTEXT_LENGTH // case.block_size)
    shape = RunnerShape(
        num_blocks=(case.rows + 1) * blocks_per_sequence,
        block_size=case.block_size,
        num_slots=case.rows + 1,
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCAB_SIZE,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_generated_tokens=case.rows + 1,
    )
    options = EngineOptions(depth=case.depth, max_prefill_chunk=CHUNK if case.load == "prompts" else None)
    first, later = LOADS[case.load](case.rows)
    clock = StepClock(plan.step_seconds)
    runner = RUNNERS[case.runner](shape, clock)
    with tempfile.TemporaryDirectory() as folder:
        loop = MeasuredLoop(runner, clock, options, Path(folder) / "engine.sock", later)
        gc.collect()
        gc.freeze()  # as the engine process does
        try:
            loop.start(first, SETTLING_TURNS)
            rounds = [figures(loop.run(plan.steps)) for _ in range(plan.rounds)]
        finally:
            loop.close()
            gc.unfreeze()
    return {name: median_and_spread([found[name] for found in rounds]) for name in rounds[0]}


def card(shape: RunnerShape, clock: StepClock) -> Runner:
    """The one for a card. Torch and triton are imported for it only."""
    from loadtest.gpu.idle import idle_runner

    return idle_runner(shape, clock)


RUNNERS: dict[str, Callable[[RunnerShape, StepClock], Runner]] = {"card": card, "none": NoRunner}


def decode(num_rows: int) -> tuple[list[Work], Iterator[Work]]:
    """Long answers to prompts whose blocks are full at different times. Nothing comes later."""
    generator = random.Random(1)
    lengths = [1_024 + index % 64 for index in range(num_rows)]
    return [Work(random_prompt(generator, length, VOCAB_SIZE), NUM_DECODED) for length in lengths], iter(())


def prompts(num_rows: int) -> tuple[list[Work], Iterator[Work]]:
    """All but one decode; beside them, one after the other, prompts of four chunks and one new token."""
    generator = random.Random(2)
    later = (Work(random_prompt(generator, 4 * CHUNK, VOCAB_SIZE), 1) for _ in itertools.count())
    return [*decode(num_rows - 1)[0], *itertools.islice(later, 2)], later


def churn(num_rows: int) -> tuple[list[Work], Iterator[Work]]:
    """Chats that come and go."""
    generator = random.Random(3)
    later = (
        Work(random_prompt(generator, generator.randint(16, 512), VOCAB_SIZE), generator.randint(16, 128))
        for _ in itertools.count()
    )
    return list(itertools.islice(later, num_rows)), later


LOADS = {"decode": decode, "prompts": prompts, "churn": churn}
"""What there is to do: works at the start, then one for each that ended."""


def figures(turns: Sequence[Turn]) -> Figures:
    """What the turns of one round come to, in microseconds; of disturbed ones only the number."""
    calm = [turn for turn in turns if not turn.is_disturbed] or turns
    totals = [turn.host_seconds for turn in calm]
    phases = {name: fmean(turn.seconds[name] for turn in calm) for name in calm[0].seconds}
    times = {**phases, "all": fmean(totals), "all_p50": median(totals), "all_p99": percentile(totals, 99)}
    return {
        **{name: 1e6 * seconds for name, seconds in times.items()},
        "rows": fmean(turn.num_rows for turn in calm),
        "tokens": fmean(turn.num_tokens for turn in calm),
        "disturbed": float(sum(turn.is_disturbed for turn in turns)),
    }


def show(result: dict[str, object]) -> None:
    """A case, for whoever watches: medians."""
    *case, found = result.values()
    row = "  ".join(f"{name} {values['median']:.0f}" for name, values in found.items())
    print(" ".join(f"{value!s:>7}" for value in case), "", row, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What a precision costs in quality: one model computed in several ways, on held-out text and in whole answers.

    python -m loadtest.quality [--model DIR] [--tokens 50000] [--baseline bfloat16] [--against bfloat16+int8 float32]

A way is a dtype, or a dtype, "+" and a quantization. Each is measured through the runner that the engine would run:

- perplexity: every token of the held-out windows given those before it, its change against the baseline's with the
  standard error of the paired differences between windows;
- greedy agreement: at how many of these positions both ways would choose the same token;
- answers: how many greedy continuations of window beginnings are the same from end to end, and how many tokens the two
  have in common before they part, on average.

Only the built-in model's perplexity means something in itself: random weights have none. The last line of output is one
JSON document. The load of the machine changes no figure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from tokenizers import Tokenizer

from loadtest import held_out
from loadtest.held_out import Window
from loadtest.machine import describe
from model.config import load_config
from model.interface import (
    CPU_BLOCK_SIZE,
    Admission,
    Batch,
    Dtype,
    Quantization,
    Row,
    Runner,
    RunnerOptions,
    Sampled,
    Sampling,
)
from service.config import Settings, let_waiting_threads_sleep

WINDOW_TOKENS = 512
NUM_SLOTS = 32
PROMPT_TOKENS = 64
ANSWER_TOKENS = 32
MAX_PROMPTS = 128
CERTAIN = 1_000.0
"""Added to a logit, makes its token the greedy choice."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures. The first way is the baseline."""

    model: Path
    tokens: int
    ways: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """One window: what was said of each token behind the first."""

    logprobs: list[float]
    """Of the token that stands there."""
    greedy_ids: list[int]
    """The token that would have been chosen."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way's results, for the same windows and prompts as any other's."""

    scores: list[Scores]
    answers: list[list[int]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One way beside the baseline. The standard error is missing where there is only one window."""

    perplexity_change_percent: float
    standard_error_percent: float | None
    greedy_agreement: float
    same_answers: float
    mean_common_prefix: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns the exit code: 2 for a model or a way that cannot be used."""
    plan = parse(arguments)
    let_waiting_threads_sleep()
    try:
        document = measure_all(plan)
    except ValueError as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


def parse(arguments: Sequence[str] | None) -> Plan:
    """The command line. Exits with 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Settings().model, help="Hugging Face directory")
    parser.add_argument("--tokens", type=int, default=50_000, help="held-out tokens, at least (default: %(default)s)")
    parser.add_argument("--baseline", default="bfloat16", help="dtype or dtype+quantization (default: %(default)s)")
    parser.add_argument(
        "--against", nargs="+", default=["bfloat16+int8", "float32"], help="(default: bfloat16+int8 float32)"
    )
    given = parser.parse_args(arguments)
    if given.tokens < 1:
        parser.error("tokens must be at least 1")
    return Plan(Path(given.model), given.tokens, (given.baseline, *given.against))


def measure_all(plan: Plan) -> dict[str, object]:
    """All ways, one model in memory at a time: the document. Raises ValueError for what cannot be used."""
    options = {way: options_of(plan.model, way) for way in plan.ways}
    context_length = min(WINDOW_TOKENS, load_config(plan.model).context_length)
    num_windows = -(-plan.tokens // (context_length - 1))
    tokenizer_file = plan.model / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ValueError(f"{tokenizer_file}: no such file")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    windows = held_out.windows(tokenizer, num_windows, context_length)
    measured: dict[str, Measured] = {}
    facts: dict[str, object] = {}
    for way in plan.ways:
        measured[way], facts[way] = measure_way(replace(options[way], context_length=context_length), windows)
        print(f"{way:16} perplexity {perplexity(measured[way].scores):.4f}", flush=True)
    baseline, *others = plan.ways
    against = {way: compare(measured[baseline], measured[way]) for way in others}
    for way, found in against.items():
        show(way, baseline, found)
    return {
        "quality": str(plan.model),
        "machine": describe(),
        "text": {
            "packages": held_out.PACKAGES,
            "digest": held_out.digest(windows),
            "windows": num_windows,
            "tokens": num_windows * (context_length - 1),
        },
        "prompts": len(measured[baseline].answers),
        "answer_tokens": ANSWER_TOKENS,
        "baseline": baseline,
        "ways": facts,
        "against": {way: rounded(asdict(found)) for way, found in against.items()},
    }


def options_of(model: Path, way: str) -> RunnerOptions:
    """What a way means to a runner. Raises ValueError for a dtype or quantization that it does not know."""
    dtype, _, quantization = way.partition("+")
    return RunnerOptions(
        str(model), Dtype(dtype), Quantization(quantization or Quantization.NONE), max_num_seqs=NUM_SLOTS
    )


def measure_way(options: RunnerOptions, windows: Sequence[Window]) -> tuple[Measured, dict[str, object]]:
    """Loads the model in one way and measures it; and what is to be known of the way."""
    # Imported last: torch takes seconds, and must find the wait policy set.
    from model.runner import load_runner

    num_blocks = NUM_SLOTS * -(-len(windows[0]) // CPU_BLOCK_SIZE)  # more than enough where blocks are larger
    runner, facts = load_runner(replace(options, num_blocks=num_blocks))
    scores = score(runner, windows)
    measured = Measured(scores, answer(runner, [window[:PROMPT_TOKENS] for window in windows[:MAX_PROMPTS]]))
    return measured, {
        "perplexity": round(perplexity(scores), 4),
        "digest": facts.digest,
        "weight_bytes": facts.weight_bytes,
        "backend": facts.backend,
        "cpu_level": facts.cpu_level,
        "threads": facts.num_threads,
    }


def score(runner: Runner, windows: Sequence[Window]) -> list[Scores]:
    """Has a runner say what it thinks of every token of windows of one length, given those before it.

    Each position is an admission of its own over the blocks that hold the positions before it, as after preemption. A
    bias makes the token of the text the one that is drawn, and so the one whose log-probability is told: that is of the
    model's own distribution, before any bias.
    """
    found = []
    for group in groups(windows, runner.shape.num_slots):
        scores = [Scores([], []) for _ in group]
        for position in range(len(group[0]) - 1):
            rows = [teaching_row(runner, slot, window, position) for slot, window in enumerate(group)]
            sampled = step(runner, rows)
            for window, told, token_id, logprobs in zip(
                group, scores, sampled.token_ids, sampled.logprobs, strict=True
            ):
                assert token_id == window[position + 1] and logprobs is not None, "the bias decides what is drawn"
                told.logprobs.append(logprobs.chosen)
                told.greedy_ids.append(logprobs.top_ids[0])
        found += scores
    return found


def answer(runner: Runner, prompts: Sequence[Window]) -> list[list[int]]:
    """The greedy continuation of each prompt, past any end-of-sequence token."""
    found = []
    for group in groups(prompts, runner.shape.num_slots):
        answers = []
        for slot, prompt in enumerate(group):
            admission = Admission(prompt, len(prompt), Sampling(temperature=0.0))
            row = Row(slot, 0, len(prompt), blocks_of(runner, slot), wants_token=True, admission=admission)
            answers.append(step(runner, [row]).token_ids)
        for place in range(1, ANSWER_TOKENS):
            rows = [Row(slot, len(prompt) + place - 1, 1, wants_token=True) for slot, prompt in enumerate(group)]
            for tokens, token_id in zip(answers, step(runner, rows).token_ids, strict=True):
                tokens.append(token_id)
        found += answers
    return found


def teaching_row(runner: Runner, slot: int, window: Window, position: int) -> Row:
    """Computes one position and draws the token that follows it in the text."""
    sampling = Sampling(temperature=0.0, logit_bias=((window[position + 1], CERTAIN),), num_logprobs=1)
    admission = Admission(window[: position + 1], position + 1, sampling)
    return Row(slot, position, 1, blocks_of(runner, slot), wants_token=True, admission=admission)


def blocks_of(runner: Runner, slot: int) -> range:
    """The slot's own blocks, enough for the whole context."""
    per_slot = -(-runner.shape.context_length // runner.shape.block_size)
    return range(slot * per_slot, (slot + 1) * per_slot)


def step(runner: Runner, rows: Sequence[Row]) -> Sampled:
    """One step, finished. Raises ValueError where the model computes no finite logits."""
    sampled = runner.launch(Batch(rows, sum(row.num_tokens for row in rows))).result()
    if not all(sampled.is_finite):
        raise ValueError("the model computes logits that are not finite")
    return sampled


def groups(windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    """Cuts a sequence into parts of at most `size`."""
    return (windows[start : start + size] for start in range(0, len(windows), size))


def perplexity(scores: Sequence[Scores]) -> float:
    """Over all tokens of windows of one length."""
    return math.exp(-fmean(mean_logprobs(scores)))


def mean_logprobs(scores: Sequence[Scores]) -> list[float]:
    """Of each window."""
    return [fmean(window.logprobs) for window in scores]


def compare(baseline: Measured, other: Measured) -> Comparison:
    """Two ways over the same windows of one length and the same prompts."""
    pairs = zip(mean_logprobs(baseline.scores), mean_logprobs(other.scores), strict=True)
    changes = [before - after for before, after in pairs]
    ratio = math.exp(fmean(changes))
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
    agreeing = [
        mine == yours
        for ours, theirs in zip(baseline.scores, other.scores, strict=True)
        for mine, yours in zip(ours.greedy_ids, theirs.greedy_ids, strict=True)
    ]
    prefixes = [common_prefix(mine, yours) for mine, yours in zip(baseline.answers, other.answers, strict=True)]
    return Comparison(
        perplexity_change_percent=100 * (ratio - 1),
        standard_error_percent=None if error is None else 100 * ratio * error,
        greedy_agreement=fmean(agreeing),
        same_answers=fmean(mine == yours for mine, yours in zip(baseline.answers, other.answers, strict=True)),
        mean_common_prefix=fmean(prefixes),
    )


def common_prefix(mine: Sequence[int], yours: Sequence[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = enumerate(zip(mine, yours, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(mine), len(yours)))


def show(way: str, baseline: str, found: Comparison) -> None:
    """A comparison, for whoever watches."""
    error = "" if found.standard_error_percent is None else f" +- {found.standard_error_percent:.3f}"
    print(
        f"{way:16} against {baseline}: perplexity {found.perplexity_change_percent:+.3f}{error} %, "
        f"greedy agreement {100 * found.greedy_agreement:.2f} %, same answers {100 * found.same_answers:.1f} %, "
        f"{found.mean_common_prefix:.1f} of {ANSWER_TOKENS} tokens in common"
    )


def rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    """To four decimals."""
    return {name: None if value is None else round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    sys.exit(main())

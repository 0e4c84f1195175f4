"""How fast the engine is by itself, how much of that arrives through gRPC, and what a warm prefix is worth.

    python -m loadtest.bench [--rounds 3] [--streams 1 8 32] [--prompt 64] [--new 64] [--out DIR]

Token ids in and out, greedy, end-of-sequence ignored, prefix cache bypassed but where it is the subject. Each round
measures the engine in this process and a server in its own, one after the other, on the same prompts; both must give
the same tokens. A level is run in several waves, each of so many streams that begin together. Figures are medians over
the rounds, with the least and the largest. The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from loadtest.machine import OUT, cpu_times, describe, noise, others_share
from loadtest.server import running_server
from loadtest.targets import Answer, EngineTarget, GrpcTarget, Target
from loadtest.timing import busy_seconds, median_and_spread, percentile
from loadtest.workloads import shared_prefix_works, uniform_works

WAVES = 8
SHARED_PREFIX = 800
OWN_TOKENS = 16
WARM_REQUESTS = 3

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run measures."""

    rounds: int
    streams: tuple[int, ...]
    num_prompt: int
    num_new: int
    out: Path


class DifferentTokens(Exception):
    """The two ways gave different answers, so their speeds cannot be compared."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns the exit code."""
    plan = parse(arguments)
    with running_server(plan.out / "bench-server.log") as server:
        engine = EngineTarget()
        before = cpu_times()
        rounds = asyncio.run(measure(plan, engine, server.address))
        others = others_share(before, cpu_times())
    if warning := noise(others):
        print(warning, file=sys.stderr)
    document = {
        "bench": "engine and gRPC",
        "machine": describe(),
        "model": {
            "dtype": engine.facts.dtype,
            "backend": engine.facts.backend,
            "cpu_level": engine.facts.cpu_level,
            "threads": engine.facts.num_threads,
        },
        "prompt_tokens": plan.num_prompt,
        "new_tokens": plan.num_new,
        "waves": WAVES,
        "rounds": plan.rounds,
        "others_share": round(others, 3),
        "server_ready_seconds": round(server.ready_seconds, 2),
        "streams": {str(level): summarise_level(level, rounds) for level in plan.streams},
        "shared_prefix_tokens": SHARED_PREFIX,
        "shared_prefix": {
            name: summarise([found[f"{name}/prefix"] for found in rounds]) for name in ("engine", "grpc")
        },
    }
    print(json.dumps(document))
    return 0


def parse(arguments: Sequence[str] | None) -> Plan:
    """The command line. Exits with 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds, alternating (default: %(default)s)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="streams at once (default: 1 8 32)")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate, at least 2 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the server's log")
    given = parser.parse_args(arguments)
    if min(given.rounds, given.prompt, *given.streams) < 1 or given.new < 2:
        parser.error("rounds, streams and prompt must be at least 1, new at least 2")
    return Plan(given.rounds, tuple(given.streams), given.prompt, given.new, given.out)


async def measure(plan: Plan, engine: EngineTarget, address: str) -> list[dict[str, Figures]]:
    """All rounds, after one that warms up both and is thrown away."""
    grpc = GrpcTarget(address)
    try:
        warm_up = replace(plan, streams=plan.streams[-1:], num_new=8)
        await measure_round(warm_up, 0, (engine, grpc), engine.facts.vocab_size)
        rounds = []
        for number in range(1, plan.rounds + 1):
            rounds.append(await measure_round(plan, number, (engine, grpc), engine.facts.vocab_size))
            show(number, rounds[-1])
        return rounds
    finally:
        await grpc.close()


async def measure_round(plan: Plan, number: int, targets: Sequence[Target], vocab_size: int) -> dict[str, Figures]:
    """One round over all levels and targets: figures by "target/level". Raises DifferentTokens."""
    found: dict[str, Figures] = {}
    for level in plan.streams:
        seed = 1_000 * number + level
        works = uniform_works(seed, WAVES * level, plan.num_prompt, plan.num_new, vocab_size)
        token_ids = []
        for target in targets:
            waves = [await target.run(works[i : i + level], use_cache=False) for i in range(0, len(works), level)]
            found[f"{target.name}/{level}"] = figures(waves)
            token_ids.append([answer.token_ids for wave in waves for answer in wave])
        if any(ids != token_ids[0] for ids in token_ids):
            raise DifferentTokens(f"round {number}, {level} streams: not the same tokens on every way")
    for target in targets:
        found[f"{target.name}/prefix"] = await measure_prefix(target, number, vocab_size)
    return found


def figures(waves: Sequence[Sequence[Answer]]) -> Figures:
    """What the waves of one level come to."""
    streams = [answer.times for wave in waves for answer in wave]
    gaps = [gap for stream in streams for gap in stream.gaps()]
    seconds = sum(busy_seconds([answer.times for answer in wave]) for wave in waves)
    return {
        "output_tokens_per_second": sum(stream.num_tokens for stream in streams) / seconds,
        "ttft_p50_ms": 1_000 * percentile([stream.ttft_seconds for stream in streams], 50),
        "itl_p50_ms": 1_000 * percentile(gaps, 50),
        "itl_p99_ms": 1_000 * percentile(gaps, 99),
    }


async def measure_prefix(target: Target, number: int, vocab_size: int) -> Figures:
    """TTFT of a prompt whose first 800 tokens are new, and the median of later prompts that share them."""
    works = shared_prefix_works(9_000 + number, 1 + WARM_REQUESTS, SHARED_PREFIX, OWN_TOKENS, vocab_size)
    cold, *warm = [(await target.run([work], use_cache=True))[0].times.ttft_seconds for work in works]
    return {
        "cold_ttft_ms": 1_000 * cold,
        "warm_ttft_ms": 1_000 * median(warm),
        "cold_over_warm": cold / median(warm),
    }


def show(number: int, found: dict[str, Figures]) -> None:
    """A round, for whoever watches."""
    for name, values in found.items():
        row = "  ".join(f"{key} {value:.2f}" for key, value in values.items())
        print(f"round {number}  {name:14} {row}", flush=True)


def summarise_level(level: int, rounds: Sequence[dict[str, Figures]]) -> dict[str, object]:
    """Both targets at one number of streams, and how much of the engine's output arrives through gRPC."""
    engine, grpc = ([found[f"{name}/{level}"] for found in rounds] for name in ("engine", "grpc"))
    key = "output_tokens_per_second"
    ratios = [through[key] / bare[key] for bare, through in zip(engine, grpc, strict=True)]
    return {"engine": summarise(engine), "grpc": summarise(grpc), "grpc_over_engine": median_and_spread(ratios)}


def summarise(rounds: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Median and spread of each figure."""
    return {key: median_and_spread([figures[key] for figures in rounds]) for key in rounds[0]}


if __name__ == "__main__":
    sys.exit(main())

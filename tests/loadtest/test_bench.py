"""The bench compares like with like: the same work on every way, and an error when answers differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtest.bench import (
    SHARED_PREFIX,
    WARM_REQUESTS,
    WAVES,
    DifferentTokens,
    Plan,
    measure_round,
    parse,
    summarise_level,
)
from loadtest.targets import Answer, EngineTarget
from loadtest.timing import StreamTimes
from loadtest.workloads import Work, uniform_works

PLAN = Plan(rounds=1, streams=(2, 3), num_prompt=4, num_new=5, out=Path())


class ScriptedTarget:
    """Takes a second to the first token and a tenth for each more; a warm prefix takes a tenth of the time."""

    def __init__(self, name: str, answer: int = 7) -> None:
        self.name = name
        self.answer = answer
        self.calls: list[tuple[list[Work], bool]] = []
        self.seen: set[tuple[int, ...]] = set()

    async def run(self, works: Sequence[Work], *, use_cache: bool) -> list[Answer]:
        self.calls.append((list(works), use_cache))
        answers = []
        for work in works:
            prefix = work.prompt[:SHARED_PREFIX]
            first = 0.1 if use_cache and prefix in self.seen else 1.0
            self.seen.add(prefix)
            arrivals = [(first + 0.1 * position, 1) for position in range(work.num_new)]
            answers.append(
                Answer(StreamTimes(0.0, len(work.prompt), arrivals, arrivals[-1][0]), [self.answer] * work.num_new)
            )
        return answers


async def test_a_round_gives_both_ways_the_same_work() -> None:
    first, second = ScriptedTarget("engine"), ScriptedTarget("grpc")
    found = await measure_round(PLAN, 1, (first, second), 100)
    assert first.calls == second.calls
    levels, prefixes = first.calls[: 2 * WAVES], first.calls[2 * WAVES :]
    assert [len(works) for works, _ in levels] == [2] * WAVES + [3] * WAVES
    assert not any(use_cache for _, use_cache in levels)
    assert len({work.prompt for works, _ in levels for work in works}) == 5 * WAVES
    assert [(len(works), use_cache) for works, use_cache in prefixes] == [(1, True)] * (1 + WARM_REQUESTS)
    assert set(found) == {f"{name}/{what}" for name in ("engine", "grpc") for what in (2, 3, "prefix")}


async def test_figures_are_those_of_the_streams() -> None:
    found = await measure_round(PLAN, 1, (ScriptedTarget("engine"),), 100)
    level = found["engine/2"]
    assert level["output_tokens_per_second"] == pytest.approx(2 * 5 / 1.4)
    assert level["ttft_p50_ms"] == pytest.approx(1_000)
    assert level["itl_p99_ms"] == pytest.approx(100)
    assert found["engine/prefix"]["cold_over_warm"] == pytest.approx(10)


async def test_different_answers_are_an_error() -> None:
    with pytest.raises(DifferentTokens, match="2 streams"):
        await measure_round(PLAN, 1, (ScriptedTarget("engine"), ScriptedTarget("grpc", answer=8)), 100)


def test_a_summary_compares_within_each_round() -> None:
    rounds = [
        {"engine/1": {"output_tokens_per_second": bare}, "grpc/1": {"output_tokens_per_second": through}}
        for bare, through in ((100.0, 90.0), (200.0, 100.0), (50.0, 40.0))
    ]
    summary = summarise_level(1, rounds)
    assert summary["grpc_over_engine"] == {"median": 0.8, "min": 0.5, "max": 0.9}
    assert summary["engine"] == {"output_tokens_per_second": {"median": 100.0, "min": 50.0, "max": 200.0}}


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--streams", "0", "4"], ["--new", "1"], ["--prompt", "0"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2


async def test_the_engine_answers_every_request_in_full_and_the_same_alone_or_together() -> None:
    engine = EngineTarget()
    works = uniform_works(3, 4, 12, 6, engine.facts.vocab_size)
    together = await engine.run(works, use_cache=False)
    alone = [(await engine.run([work], use_cache=False))[0] for work in works]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.times.num_tokens for answer in together] == [6] * 4


async def test_a_temperature_changes_the_answers() -> None:
    engine = EngineTarget()
    works = uniform_works(3, 2, 12, 8, engine.facts.vocab_size)
    greedy = await engine.run(works, use_cache=False)
    drawn = await engine.run(works, use_cache=False, temperature=5.0)
    assert all(hot.token_ids != cold.token_ids for hot, cold in zip(drawn, greedy, strict=True))

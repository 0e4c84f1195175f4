"""What the records of a check mean: each goal with what was measured, and the table for a terminal.

Standard library only. A goal is judged where its figures are there; what was not measured is left out, and the list of
parts says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loadtest.gpu.records import Record

DECODE_SHARES = {"8B": 0.85, "1B": 0.70}
"""Of the limit, at every batch."""
PREFILL_TOKENS = 8192
PREFILL_SHARE = 0.70
READY_SECONDS = 10.0
READY_MODEL = "8B"
GRPC_RATIO = 0.95
PEER_RATIO = 3.0
REPRODUCIBLE_COSTS = {1: 0.10, 32: 0.05}
"""At most, from so many rows on."""
PUBLISHED = "share of the limit that others publish: vLLM about 0.56 (H100), SGLang 0.64 to 0.83 (H200)"
"""Beside decode's goals; neither is at hand where a card is."""
BASELINE = "torch"
"""The products that others are compared with."""
OURS, THROUGH_GRPC, PEER = "quire", "quire through gRPC", "transformers"
RATE = "output_tokens_per_second"


class PartResult(Protocol):
    """What is told of a part's end."""

    @property
    def part(self) -> str: ...

    @property
    def status(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    @property
    def why(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """One goal."""

    name: str
    measured: float
    goal: float
    is_least: bool
    """Whether the goal is the least that is wanted, and not the most."""
    detail: str = ""

    @property
    def is_met(self) -> bool:
        """Whether what was measured is as wanted."""
        return self.measured >= self.goal if self.is_least else self.measured <= self.goal


def verdicts_of(records: Sequence[Record]) -> list[Verdict]:
    """Every goal that the records can tell of, in the order of the parts."""
    return [
        *_wrong_results(records),
        *_decode(records),
        *_prefill(records),
        *_reproducible(records),
        *_against(records, PEER),
        *_against(records, THROUGH_GRPC),
        *_ready(records),
    ]


def _of_kind(records: Iterable[Record], kind: str) -> Iterator[Record]:
    return (record for record in records if record["kind"] == kind)


def _wrong_results(records: Sequence[Record]) -> Iterator[Verdict]:
    """Of kernels and logits against float32, and of the marked tests."""
    judged = [record for record in records if "is_right" in record]
    if judged:
        wrong = [record for record in judged if not record["is_right"]]
        yield Verdict("wrong results", len(wrong), 0, False, f"of {len(judged)} measured")
    tests = list(_of_kind(records, "test"))
    if tests:
        failed = [test["name"] for test in tests if test["outcome"] == "failed"]
        yield Verdict("failed tests", len(failed), 0, False, f"of {len(tests)} {' '.join(failed[:3])}".strip())


def _decode(records: Sequence[Record]) -> Iterator[Verdict]:
    for record in _of_kind(records, "decode"):
        goal = DECODE_SHARES[record["model"]]
        detail = f"{record['ms']:.3f} ms, limit {record['limit_ms']:.3f}; without overlap {record['alone_ms']:.3f}"
        yield Verdict(f"decode {record['model']} at {record['batch']}", record["share"], goal, True, detail)


def _prefill(records: Sequence[Record]) -> Iterator[Verdict]:
    for record in _of_kind(records, "prefill"):
        if record["tokens"] == PREFILL_TOKENS:
            detail = f"{record['ms']:.1f} ms, limit {record['limit_ms']:.1f}"
            yield Verdict(
                f"prefill {record['model']} of {PREFILL_TOKENS}", record["share"], PREFILL_SHARE, True, detail
            )


def _reproducible(records: Sequence[Record]) -> Iterator[Verdict]:
    """What the cheapest products whose rows' bits are always alike cost of a whole decode step."""
    steps = {(record["model"], record["batch"]): record["ms"] for record in _of_kind(records, "decode")}
    products = list(_of_kind(records, "products of a step"))
    differing = {(each["model"], each["way"]) for each in products if not each["has_bits_of_alone"]}
    for (model, rows), step in steps.items():
        found = {each["way"]: each["ms"] for each in products if (each["model"], each["rows"]) == (model, rows)}
        holding = {way: ms for way, ms in found.items() if (model, way) not in differing}
        if not holding or BASELINE not in found:
            continue
        way = min(holding, key=holding.__getitem__)
        cost = (holding[way] - found[BASELINE]) / step
        goal = [goal for least, goal in REPRODUCIBLE_COSTS.items() if rows >= least][-1]
        detail = f"{way}: {holding[way]:.3f} ms, {BASELINE}'s own {found[BASELINE]:.3f}"
        yield Verdict(f"reproducible products {model} at {rows}: cost", cost, goal, False, detail)


def _against(records: Sequence[Record], other: str) -> Iterator[Verdict]:
    """Our output by a peer's, or what arrives through gRPC by the bare engine's."""
    rates: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in _of_kind(records, "workload"):
        if RATE in record:
            key = record["model"], record["workload"], record["batch"]
            rates.setdefault(key, {})[record["engine"]] = record[RATE]
    for (model, workload, batch), found in rates.items():
        if OURS not in found or other not in found:
            continue
        name, detail = f"{workload} {model} at {batch}", f"{found[OURS]:,.0f} tok/s, {other} {found[other]:,.0f}"
        if other == PEER:
            yield Verdict(f"{name} by {other}", found[OURS] / found[other], PEER_RATIO, True, detail)
        else:
            yield Verdict(f"{name}: gRPC by engine", found[other] / found[OURS], GRPC_RATIO, True, detail)


def _ready(records: Sequence[Record]) -> Iterator[Verdict]:
    for record in _of_kind(records, "ready"):
        if record["model"] == READY_MODEL:
            yield Verdict(f"ready {READY_MODEL}, seconds", record["seconds"], READY_SECONDS, False)


def as_text(results: Sequence[PartResult], verdicts: Sequence[Verdict]) -> str:
    """The parts and the goals, a line each."""
    lines = ["", "parts"]
    width = max((len(result.part) for result in results), default=0)
    lines += [f"  {each.part:{width}}  {each.seconds:6.1f} s  {each.status}  {each.why}".rstrip() for each in results]
    if verdicts:
        lines += ["", "goals"]
        width = max(len(verdict.name) for verdict in verdicts)
        lines += [f"  {verdict_line(verdict, width)}".rstrip() for verdict in verdicts]
        lines += ["", PUBLISHED]
    return "\n".join(lines)


def verdict_line(verdict: Verdict, width: int) -> str:
    """One goal."""
    bound = "at least" if verdict.is_least else "at most"
    word = "met   " if verdict.is_met else "MISSED"
    return f"{verdict.name:{width}}  {word}  {verdict.measured:8.3f}  {bound} {verdict.goal:g}  {verdict.detail}"


def as_document(verdict: Verdict) -> Mapping[str, Any]:
    """For the last line."""
    return {
        "name": verdict.name,
        "measured": round(verdict.measured, 4),
        "goal": verdict.goal,
        "is_met": verdict.is_met,
    }

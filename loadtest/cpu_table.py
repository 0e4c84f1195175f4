"""What a comparison on the CPU came to: medians, spreads and ratios of its measurements, as rows and as Markdown. Pure.

It does not know how engines are run. The measurements of a file may come from a run that was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from loadtest.machine import TOLERATED_SHARE
from loadtest.timing import median_and_spread

OURS = "quire"
OURS_THROUGH_GRPC = "quire-grpc"

NOTHING = "\N{EN DASH}"

Spread = dict[str, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the runners, as the table shows it."""

    title: str
    lower_is_better: bool
    digits: int = 0


FIGURES = {
    "ms_per_token": Figure("ms per token", True, 2),
    "prefill_tokens_per_second": Figure("prefill tok/s", False),
    "output_tokens_per_second": Figure("output tok/s", False),
    "ttft_ms": Figure("TTFT ms of the long prompt", True),
    "longest_gap_ms": Figure("longest gap ms of the streams", True),
}
SHOWN = {
    "W1": ("ms_per_token", "prefill_tokens_per_second"),
    "W2": ("output_tokens_per_second",),
    "W3": ("output_tokens_per_second",),
    "W5": ("ttft_ms", "longest_gap_ms"),
}
"""The figures that each workload is judged by."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one engine did: a workload of one model at one precision."""

    model: str
    workload: str
    batch: int
    precision: str

    @property
    def title(self) -> str:
        """How the table calls it."""
        batch = f" at {self.batch}" if self.workload == "W2" else ""
        return f"{self.model} {self.workload}{batch} {self.precision}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one engine."""

    cell: Cell
    engine: str
    round: int
    others_share: float
    figures: dict[str, float]

    @property
    def is_noisy(self) -> bool:
        """Whether others took too much of the machine meanwhile."""
        return self.others_share > TOLERATED_SHARE

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Measurement:
        """Reads what `as_record` wrote."""
        return cls(**{**record, "cell": Cell(**record["cell"])})

    def as_record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    cell: Cell
    figure: str
    engines: dict[str, Spread]
    num_noisy: dict[str, int] = field(default_factory=dict)
    """Rounds of each engine that stayed noisy however often they were repeated."""
    best_peer: str | None = None
    ratio: Spread | None = None
    """How many times better than the best peer ours is, round by round; above 1 is better for every figure."""
    grpc_over_engine: Spread | None = None
    limit: float | None = None
    """The least time or the highest rate of loadtest/roofline.py; of the rounds' limits, the median."""
    share_of_limit: float | None = None
    """What ours reaches of the limit of its own session, the median of the rounds.

    Above 1 where weights are kept smaller than the limit counts them.
    """

    def as_record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def quietest(measurements: Iterable[Measurement]) -> list[Measurement]:
    """One measurement for each round, engine and cell: of several tries, the least disturbed."""
    found: dict[tuple[Cell, str, int], Measurement] = {}
    for measurement in measurements:
        key = (measurement.cell, measurement.engine, measurement.round)
        if key not in found or measurement.others_share < found[key].others_share:
            found[key] = measurement
    return list(found.values())


def rows_of(measurements: Iterable[Measurement], limits: Mapping[tuple[Cell, int], Mapping[str, float]]) -> list[Row]:
    """All rows, in the order in which their cells were first measured. The limits are those of each cell and round."""
    chosen = quietest(measurements)
    cells = dict.fromkeys(measurement.cell for measurement in chosen)
    return [
        row_of(cell, figure, [found for found in chosen if found.cell == cell], limits_by_round(limits, cell, figure))
        for cell in cells
        for figure in SHOWN[cell.workload]
    ]


def limits_by_round(
    limits: Mapping[tuple[Cell, int], Mapping[str, float]], cell: Cell, figure: str
) -> dict[int, float]:
    """The limits of one figure of a cell, of the rounds that have one."""
    return {
        number: figures[figure] for (other, number), figures in limits.items() if other == cell and figure in figures
    }


def row_of(cell: Cell, figure: str, measurements: Sequence[Measurement], limits: Mapping[int, float]) -> Row:
    """One figure of all engines, and how ours compares. The limits are those of the rounds."""
    by_engine: dict[str, dict[int, float]] = {}
    num_noisy: dict[str, int] = {}
    for found in measurements:
        by_engine.setdefault(found.engine, {})[found.round] = found.figures[figure]
        num_noisy[found.engine] = num_noisy.get(found.engine, 0) + found.is_noisy
    spreads = {engine: median_and_spread(list(values.values())) for engine, values in by_engine.items()}
    lower_is_better = FIGURES[figure].lower_is_better
    best_peer = best_of({engine: spread for engine, spread in spreads.items() if is_peer(engine)}, lower_is_better)
    ours = by_engine.get(OURS, {})
    share = ratio_of(ours, limits, lower_is_better)
    return Row(
        cell=cell,
        figure=figure,
        engines=spreads,
        num_noisy=num_noisy,
        best_peer=best_peer,
        ratio=ratio_of(ours, by_engine.get(best_peer or "", {}), lower_is_better),
        grpc_over_engine=ratio_of(by_engine.get(OURS_THROUGH_GRPC, {}), ours, lower_is_better),
        limit=median(limits.values()) if limits else None,
        share_of_limit=share["median"] if share else None,
    )


def is_peer(engine: str) -> bool:
    """Whether it is somebody else's."""
    return engine not in (OURS, OURS_THROUGH_GRPC)


def best_of(spreads: Mapping[str, Spread], lower_is_better: bool) -> str | None:
    """The engine with the best median; None of none."""
    if not spreads:
        return None
    choose = min if lower_is_better else max
    return choose(spreads, key=lambda engine: spreads[engine]["median"])


def ratio_of(ours: Mapping[int, float], theirs: Mapping[int, float], lower_is_better: bool) -> Spread | None:
    """How many times better the first is, over the rounds that both have."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    return median_and_spread([better_by(ours[number], theirs[number], lower_is_better) for number in shared])


def better_by(ours: float, theirs: float, lower_is_better: bool) -> float:
    """Above 1 when ours is better."""
    return theirs / ours if lower_is_better else ours / theirs


def as_markdown(rows: Sequence[Row]) -> str:
    """The table; `~` marks medians among whose rounds some stayed noisy."""
    engines = list(dict.fromkeys(engine for row in rows for engine in row.engines))
    titles = ["work", *engines, "ours / best peer", "gRPC / engine", "share of the limit"]
    lines = [as_line(titles), as_line(["---"] * len(titles))]
    for row in rows:
        digits = FIGURES[row.figure].digits
        cells = [as_text(row.engines.get(engine), digits, row.num_noisy.get(engine, 0) > 0) for engine in engines]
        share = NOTHING if row.share_of_limit is None else f"{row.share_of_limit:.0%}"
        ratios = [as_text(row.ratio, 2), as_text(row.grpc_over_engine, 2)]
        lines.append(as_line([f"{row.cell.title}: {FIGURES[row.figure].title}", *cells, *ratios, share]))
    return "\n".join(lines)


def as_line(cells: Iterable[str]) -> str:
    """One line of Markdown."""
    return f"| {' | '.join(cells)} |"


def as_text(spread: Spread | None, digits: int, is_noisy: bool = False) -> str:
    """A median with its least and largest."""
    if spread is None:
        return NOTHING
    median, least, largest = (f"{spread[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{'~' if is_noisy else ''}{median} ({least} to {largest})"

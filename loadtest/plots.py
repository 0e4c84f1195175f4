"""The pictures of a load test. Each function makes one figure of plain numbers; none knows the page they end on.

Milliseconds run along a logarithmic axis with ticks at 1, 2 and 5 of every decade; counts and shares begin at zero.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from loadtest.timing import percentile

BIN_SECONDS = 1.0
MARKED = (50, 90, 99)
MAX_TICKS = 16


def as_data_url(figure: Figure) -> str:
    """A figure as an SVG that a page can hold; the same figure gives the same text."""
    image = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "quire"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(image.getvalue()).decode()


def milliseconds(value: float) -> str:
    """A latency in three figures or so, without the unit."""
    if not value:
        return "0"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def plot_throughput(arrivals: Sequence[tuple[float, int]]) -> Figure:
    """Tokens that arrived in each second, from (seconds since the beginning, tokens)."""
    figure, (axes,) = blank()
    axes.set(xlabel="seconds since the first request", ylabel="output tokens/s")
    if arrivals:
        when, counts = np.array(arrivals).T
        edges = BIN_SECONDS * np.arange(math.floor(when.max() / BIN_SECONDS) + 2)
        totals, _ = np.histogram(when, bins=edges, weights=counts)
        axes.stairs(totals / BIN_SECONDS, edges, fill=True, alpha=0.25, color="C0")
        axes.stairs(totals / BIN_SECONDS, edges, color="C0")
    begin_at_zero(axes)
    return figure


def plot_load(
    when: Sequence[float], running: Sequence[float], waiting: Sequence[float], kv_ratio: Sequence[float]
) -> Figure:
    """Running and waiting requests above, the share of the KV blocks in use below, over seconds."""
    figure, (requests, usage) = blank(2)
    requests.plot(when, running, label="running", drawstyle="steps-post")
    requests.plot(when, waiting, label="waiting", drawstyle="steps-post", linestyle="--")
    requests.set_ylabel("requests")
    requests.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    requests.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    used = [100 * ratio for ratio in kv_ratio]
    usage.plot(when, used, color="C2", drawstyle="steps-post")
    usage.fill_between(when, used, color="C2", alpha=0.25, step="post")
    usage.set(xlabel="seconds since the first request", ylabel="KV blocks in use, %")
    begin_at_zero(requests, least_top=1.0)
    begin_at_zero(usage)
    return figure


def plot_distribution(seconds: Sequence[float], xlabel: str) -> Figure:
    """The share of latencies at or below each, with percentiles marked. Zeros lie left of the logarithmic axis."""
    figure, (axes,) = blank()
    axes.set(xlabel=f"{xlabel}, ms", ylabel="% at or below", ylim=(0, 108), yticks=range(0, 101, 20), xscale="log")
    values = np.sort(1_000 * np.asarray(seconds, dtype=float))
    ticks = ticks_around(values[values > 0].tolist())
    axes.set_xlim(ticks[0], ticks[-1])
    labelled = ticks if len(ticks) <= MAX_TICKS else [tick for tick in ticks if math.log10(tick).is_integer()]
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:,g}")
    if len(values):
        shares = 100 * np.arange(1, len(values) + 1) / len(values)
        axes.step([ticks[0], *np.maximum(values, ticks[0]), ticks[-1]], [0, *shares, 100], where="post")
        for percent in MARKED:
            mark(axes, percent, 1_000 * percentile(seconds, percent), ticks)
    return figure


def mark(axes: Axes, percent: int, value: float, ticks: Sequence[float]) -> None:
    """A point and its label; left of the point, where a distribution leaves room, unless the axis begins there."""
    at = max(value, ticks[0])
    is_left = math.log(at / ticks[0]) < 0.2 * math.log(ticks[-1] / ticks[0])
    axes.vlines(at, 0, percent, color="C3", linewidth=1, linestyle=":")
    axes.plot([at], [percent], "o", color="C3", markersize=5, clip_on=False)
    axes.annotate(
        f"p{percent}  {milliseconds(value)} ms",
        (at, percent),
        xytext=(7, -3) if is_left else (-7, 0),
        textcoords="offset points",
        ha="left" if is_left else "right",
        va="top" if is_left else "bottom",
        color="C3",
    )


def ticks_around(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 of every decade from just below the least of the values, all positive, to just above the largest."""
    least, largest = (min(values), max(values)) if len(values) else (1.0, 10.0)
    decades = range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(largest)) + 2)
    steps = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step < least or i == 0)
    last = min(i for i, step in enumerate(steps) if step > largest)
    return steps[first : last + 1]


def blank(rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many plots, one below the other over the same x axis."""
    figure = Figure(figsize=(9, 1.6 + 1.8 * rows), layout="constrained")
    plots = list(figure.subplots(rows, sharex=True, squeeze=False).flat)
    for axes in plots:
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, plots


def begin_at_zero(axes: Axes, least_top: float = 0.0) -> None:
    """Both axes from zero to a little above what is there."""
    axes.set_xlim(left=0)
    top = max(axes.dataLim.y1 if np.isfinite(axes.dataLim.y1) else 0.0, least_top)
    axes.set_ylim(0, 1.1 * top if top else 1.0)

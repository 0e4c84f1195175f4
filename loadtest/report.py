"""One load test as figures and as a page: throughput, latency percentiles, and the server's own view of its load.

Knows streams (loadtest.timing) and samples of the server's metrics; not how either was gathered.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.timing import StreamTimes, busy_seconds, percentiles_ms

RUNNING = "quire_num_requests_running"
WAITING = "quire_num_requests_waiting"
KV_USAGE = "quire_kv_cache_usage_ratio"
BIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's metrics at one moment, on the readers' clock."""

    at: float
    values: dict[str, float]


def read_streams(file: Path) -> list[StreamTimes]:
    """What the users wrote. Raises ValueError for lines of another form."""
    streams = []
    for line in file.read_text().splitlines():
        fields = json.loads(line)
        fields["arrivals"] = [(float(when), int(count)) for when, count in fields["arrivals"]]
        try:
            streams.append(StreamTimes(**fields))
        except TypeError as error:
            raise ValueError(f"{file}: not a stream: {error}") from None
    return streams


def summarise(streams: Sequence[StreamTimes]) -> dict[str, Any]:
    """Figures of a load test. Latencies are those of streams that ended well; failures count by reason."""
    good = [stream for stream in streams if stream.reason is None]
    summary: dict[str, Any] = {
        "requests": len(streams),
        "failed": len(streams) - len(good),
        "errors": dict(sorted(Counter(stream.reason for stream in streams if stream.reason).items())),
        "requests_per_second": 0.0,
        "output_tokens_per_second": 0.0,
        "ttft_ms": percentiles_ms([stream.ttft_seconds for stream in good if stream.arrivals]),
        "itl_ms": percentiles_ms([gap for stream in good for gap in stream.gaps()]),
        "e2e_ms": percentiles_ms([stream.e2e_seconds for stream in good]),
    }
    if good:
        seconds = busy_seconds(good)
        summary["requests_per_second"] = round(len(good) / seconds, 2)
        summary["output_tokens_per_second"] = round(sum(stream.num_tokens for stream in good) / seconds, 1)
    return summary


def write_page(file: Path, summary: dict[str, Any], streams: Sequence[StreamTimes], samples: Sequence[Sample]) -> None:
    """The report as one HTML file that needs nothing beside it."""
    mpl.rcParams["svg.hashsalt"] = "quire"
    begin = min([stream.sent_at for stream in streams] + [sample.at for sample in samples], default=0.0)
    pictures = [
        ("Output", draw(lambda axes: plot_throughput(axes, streams, begin))),
        ("Load, as the server tells it", draw(lambda axes: plot_load(axes, samples, begin))),
        (
            "Time to first token",
            draw(lambda axes: plot_percentiles(axes, [s.ttft_seconds for s in streams if s.arrivals])),
        ),
        (
            "Gap between two tokens",
            draw(lambda axes: plot_percentiles(axes, [gap for s in streams for gap in s.gaps()])),
        ),
    ]
    body = "".join(f"<h2>{html.escape(title)}</h2><img alt='' src='{picture}'>" for title, picture in pictures)
    file.write_text(PAGE.format(figures=html.escape(json.dumps(summary, indent=2)), pictures=body))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Quire under load</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto }} img {{ max-width: 100% }}</style></head>
<body><h1>Quire under load</h1><pre>{figures}</pre>{pictures}</body></html>
"""


def draw(plot: Any) -> str:
    """A plot as a data URL."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, alpha=0.3)
    plot(axes)
    image = io.BytesIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(image.getvalue()).decode()


def plot_throughput(axes: Axes, streams: Sequence[StreamTimes], begin: float) -> None:
    """Tokens that arrived in each second."""
    arrivals = [(when - begin, count) for stream in streams for when, count in stream.arrivals]
    axes.set(xlabel="seconds", ylabel="output tokens/s")
    if arrivals:
        when, counts = np.array(arrivals).T
        edges = np.arange(0.0, when.max() + BIN_SECONDS, BIN_SECONDS)
        totals, _ = np.histogram(when, bins=np.append(edges, edges[-1] + BIN_SECONDS), weights=counts)
        axes.step(edges, totals / BIN_SECONDS, where="post")
        axes.set_ylim(bottom=0)


def plot_load(axes: Axes, samples: Sequence[Sample], begin: float) -> None:
    """Running and waiting requests, and the share of the key/value pool in use."""
    when = [sample.at - begin for sample in samples]
    for name, label in ((RUNNING, "running"), (WAITING, "waiting")):
        axes.plot(when, [sample.values.get(name, 0.0) for sample in samples], label=label)
    axes.set(xlabel="seconds", ylabel="requests")
    usage = axes.twinx()
    usage.plot(when, [100 * sample.values.get(KV_USAGE, 0.0) for sample in samples], ":", color="grey", label="KV pool")
    usage.set(ylabel="% of KV blocks", ylim=(0, 100))
    axes.figure.legend(loc="outside upper right", ncols=3)


def plot_percentiles(axes: Axes, seconds: Sequence[float]) -> None:
    """Latency against the share of requests at or below it."""
    axes.set(xlabel="percentile", ylabel="ms", yscale="symlog")
    if seconds:
        shares = np.linspace(0, 100, 501)
        axes.plot(shares, 1_000 * np.percentile(seconds, shares))

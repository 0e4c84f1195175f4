"""One load test as figures, as text and as a page.

Knows streams (loadtest.timing) and samples of the server's metrics; not how either was gathered.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from loadtest.machine import TOLERATED_SHARE, noise
from loadtest.plots import as_data_url, milliseconds, plot_distribution, plot_load, plot_throughput
from loadtest.timing import StreamTimes, busy_seconds, percentile, percentiles_ms

RUNNING = "quire_num_requests_running"
WAITING = "quire_num_requests_waiting"
KV_USAGE = "quire_kv_cache_usage_ratio"

LATENCIES = {"ttft_ms": "TTFT", "itl_ms": "ITL", "e2e_ms": "E2E"}
COLUMNS = ("p50", "p90", "p99", "max")
CUT_OFF = "Streams that the end of the test cut off are left out, so the last seconds show less than was sent."


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's metrics at one moment, on the readers' clock."""

    at: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with the words around it; `alt` says what it shows to who cannot see it."""

    title: str
    figure: Figure
    alt: str
    caption: str


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


def as_text(summary: Mapping[str, Any]) -> str:
    """The figures for a terminal: one row per latency, then requests, failures and output."""
    lines = [f"{'ms':6}" + "".join(f"{name:>10}" for name in COLUMNS)]
    lines += [f"{name:6}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in latency_rows(summary)]
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in count_rows(summary))])


def latency_rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Name and cells, in milliseconds; a dash where nothing was measured."""
    return [
        (name, [milliseconds(summary[key][column]) if summary[key] else "-" for column in COLUMNS])
        for key, name in LATENCIES.items()
    ]


def count_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is not a latency."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary["errors"].items())
    return [
        ("requests", f"{summary['requests']:,} ({summary['requests_per_second']:g} good ones/s)"),
        ("failed", f"{summary['failed']:,}" + (f" ({reasons})" if reasons else "")),
        ("output", f"{summary['output_tokens_per_second']:,.1f} tok/s"),
    ]


def write_page(
    file: Path, summary: Mapping[str, Any], streams: Sequence[StreamTimes], samples: Sequence[Sample]
) -> None:
    """The report as one HTML file that needs nothing beside it. `summary` is the command's JSON document."""
    warning = noise(summary["others_share"])
    file.write_text(
        PAGE.format(
            warning=f"<p class='warning'>{html.escape(warning)}</p>" if warning else "",
            about=table([(name, [value]) for name, value in about(summary, streams)]),
            latencies=table(latency_rows(summary), ("ms", *COLUMNS)),
            counts=table([(name, [value]) for name, value in count_rows(summary)]),
            pictures="".join(map(as_html, pictures(streams, samples))),
            json=html.escape(json.dumps(summary)),
        )
    )


def about(summary: Mapping[str, Any], streams: Sequence[StreamTimes]) -> list[tuple[str, str]]:
    """When, where and with what it was measured."""
    machine = summary["machine"]
    return [
        ("date", summary["date"]),
        ("commit", machine["commit"]),
        ("machine", f"{machine['cpu']}, {machine['cpus']} CPUs, Python {machine['python']}"),
        ("command", summary["command"]),
        ("workload", workload(summary, streams)),
        (
            "others_share",
            f"{summary['others_share']:.1%}: CPU time of the machine that went to processes other than the test's own "
            f"(its server and its users); above {TOLERATED_SHARE:.0%} the figures are noisy",
        ),
    ]


def workload(summary: Mapping[str, Any], streams: Sequence[StreamTimes]) -> str:
    """What was asked of the server, and how long prompts and answers came out."""
    text = f"{summary['users']} users for {summary['seconds']} s, each sending its next request when its last one ended"
    good = [stream for stream in streams if stream.reason is None]
    if not good:
        return f"{text}; {summary['loadtest']} lengths"
    lengths = {"prompts": [s.num_prompt for s in good], "answers": [s.num_tokens for s in good]}
    drawn = [f"{name} p50 {percentile(n, 50):.0f}, p99 {percentile(n, 99):.0f} tokens" for name, n in lengths.items()]
    return f"{text}; {summary['loadtest']} lengths, scaled to the model's context: {'; '.join(drawn)}"


def pictures(streams: Sequence[StreamTimes], samples: Sequence[Sample]) -> list[Picture]:
    """All figures of the page. Latencies are those of the table: of streams that ended well."""
    begin = min((stream.sent_at for stream in streams), default=samples[0].at if samples else 0.0)
    good = [stream for stream in streams if stream.reason is None]
    ttft = [stream.ttft_seconds for stream in good if stream.arrivals]
    gaps = [gap for stream in good for gap in stream.gaps()]
    merged = f"{gaps.count(0.0) / len(gaps):.1%} of them" if gaps else "none here"
    return [
        Picture(
            "Time to first token (TTFT)",
            plot_distribution(ttft, "time to first token"),
            f"Cumulative distribution of the time to first token: {in_words(ttft)}.",
            "From sending a request to its first token.",
        ),
        Picture(
            "Gap between two tokens (ITL)",
            plot_distribution(gaps, "gap between two tokens"),
            f"Cumulative distribution of the gaps between tokens: {in_words(gaps)}.",
            "Tokens that the server merged into one message arrive together, so the gaps between them are 0 "
            f"({merged}); they lie left of the axis and lift the curve's beginning.",
        ),
        load_picture(samples, begin),
        Picture(
            "Output",
            plot_throughput([(when - begin, count) for stream in streams for when, count in stream.arrivals]),
            "Output tokens that arrived in each second of the test.",
            CUT_OFF,
        ),
    ]


def load_picture(samples: Sequence[Sample], begin: float) -> Picture:
    """The timeline of the server's own metrics, from the first request on."""
    seen = [sample for sample in samples if sample.at >= begin]
    running, waiting, usage = ([s.values.get(name, 0.0) for s in seen] for name in (RUNNING, WAITING, KV_USAGE))
    return Picture(
        "Load, as the server's metrics tell it",
        plot_load([sample.at - begin for sample in seen], running, waiting, usage),
        f"Timeline of requests and KV blocks: at most {max(running, default=0):.0f} running, "
        f"{max(waiting, default=0):.0f} waiting and {100 * max(usage, default=0):.1f} % of the KV blocks in use.",
        "Running and waiting requests, and the share of the KV blocks that they hold, scaled to what was used.",
    )


def in_words(seconds: Sequence[float]) -> str:
    """The percentiles as a phrase."""
    found = percentiles_ms(seconds)
    return (
        ", ".join(f"{name} {milliseconds(value)} ms" for name, value in found.items()) if found else "nothing to show"
    )


def as_html(picture: Picture) -> str:
    """A picture with its title and caption."""
    title, alt, caption = (html.escape(text) for text in (picture.title, picture.alt, picture.caption))
    image = f"<img alt='{alt}' src='{as_data_url(picture.figure)}'>"
    return f"<h2>{title}</h2><figure>{image}<figcaption>{caption}</figcaption></figure>"


def table(rows: Sequence[tuple[str, Sequence[str]]], head: Sequence[str] = ()) -> str:
    """Rows of a name and its cells, below a head."""
    body = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    body = f"<tr>{body}</tr>" if head else ""
    for name, cells in rows:
        found = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f"<tr><th scope='row'>{html.escape(name)}</th>{found}</tr>"
    return f"<table class='{'numbers' if head else 'facts'}'>{body}</table>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Quire under load</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }} th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd }}
th {{ text-align: left; vertical-align: top }} .numbers td, .numbers th[scope=col] + th {{ text-align: right }}
.warning {{ background: #fff3cd; border: 1px solid #b58900; padding: .5rem 1rem }}
figure {{ margin: 0 }} figcaption {{ color: #555 }} img {{ max-width: 100% }}
pre {{ background: #f4f4f4; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere }}</style></head>
<body><h1>Quire under load</h1>{warning}{latencies}{counts}{about}{pictures}
<details><summary>The same as JSON</summary><pre>{json}</pre></details></body></html>
"""

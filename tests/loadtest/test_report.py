"""The report's figures are those of the streams, and its page stands alone."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.report import KV_USAGE, RUNNING, WAITING, Sample, as_text, pictures, read_streams, summarise, write_page
from loadtest.timing import StreamTimes

GOOD = StreamTimes(0.0, 3, [(0.2, 1), (0.3, 1), (2.0, 2)], 2.0)
LATER = StreamTimes(1.0, 3, [(1.4, 4)], 1.5)
REFUSED = StreamTimes(1.0, 3, [], 1.1, "QUEUE_FULL")
BROKEN = StreamTimes(0.5, 3, [(9.0, 1)], 9.0, "ENGINE_LOST")
SAMPLES = [Sample(float(second), {RUNNING: 2.0, WAITING: 1.0, KV_USAGE: 0.25}) for second in range(3)]


def test_streams_come_back_as_they_were_written(tmp_path: Path) -> None:
    streams = [GOOD, REFUSED]
    (tmp_path / "streams.jsonl").write_text("".join(json.dumps(asdict(stream)) + "\n" for stream in streams))
    assert read_streams(tmp_path / "streams.jsonl") == streams


def test_lines_of_another_form_are_refused(tmp_path: Path) -> None:
    (tmp_path / "streams.jsonl").write_text('{"arrivals": [], "speed": 1}\n')
    with pytest.raises(ValueError, match="not a stream"):
        read_streams(tmp_path / "streams.jsonl")


def test_failures_count_by_reason_and_do_not_enter_the_latencies() -> None:
    summary = summarise([GOOD, LATER, REFUSED, BROKEN])
    assert (summary["requests"], summary["failed"]) == (4, 2)
    assert summary["errors"] == {"ENGINE_LOST": 1, "QUEUE_FULL": 1}
    assert summary["output_tokens_per_second"] == 4.0
    assert summary["requests_per_second"] == 1.0
    assert summary["ttft_ms"] == {"p50": 300.0, "p90": 380.0, "p99": 398.0, "max": 400.0}
    assert summary["itl_ms"]["max"] == 1_700.0
    assert summary["e2e_ms"]["max"] == 2_000.0


def test_a_test_without_a_good_stream_has_no_figures() -> None:
    summary = summarise([REFUSED])
    assert summary["output_tokens_per_second"] == 0.0
    assert summary["ttft_ms"] is None


def test_the_text_tells_latencies_failures_and_output() -> None:
    lines = as_text(summarise([GOOD, LATER, REFUSED, BROKEN])).splitlines()
    assert [line.split() for line in lines[:2]] == [["ms", "p50", "p90", "p99", "max"], "TTFT 300 380 398 400".split()]
    assert [line.split()[0] for line in lines[2:4]] == ["ITL", "E2E"]
    assert lines[4:] == [
        "requests: 4 (1 good ones/s)",
        "failed: 2 (1 ENGINE_LOST, 1 QUEUE_FULL)",
        "output: 4.0 tok/s",
    ]


def test_what_was_not_measured_is_a_dash() -> None:
    assert "TTFT".ljust(6) + 4 * "         -" in as_text(summarise([REFUSED]))


def document(streams: list[StreamTimes], others_share: float = 0.1) -> dict[str, Any]:
    return {
        "loadtest": "chat",
        "date": "2026-01-02 03:04 UTC",
        "command": "python -m loadtest.run --users 2 --out '<b> & more'",
        "machine": {"cpu": "Abacus", "cpus": 2, "python": "3.11.0", "commit": "0123abc+"},
        "users": 2,
        "seconds": 3,
        "others_share": others_share,
        **summarise(streams),
    }


@pytest.mark.parametrize(("streams", "samples"), [([GOOD, LATER, REFUSED], SAMPLES), ([], SAMPLES), ([], [])])
def test_the_page_stands_alone_and_tells_the_figures(
    tmp_path: Path, streams: list[StreamTimes], samples: list[Sample]
) -> None:
    write_page(tmp_path / "report.html", document(streams), streams, samples)
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall(r"<img alt='[^']{20,}' src='data:image/svg\+xml;base64,", page)) == 4
    assert not re.search(r"(?:src|href)=['\"](?!data:)", page)
    for fact in (
        "2026-01-02 03:04 UTC",
        "Abacus, 2 CPUs",
        "0123abc+",
        "&lt;b&gt; &amp; more",
        "2 users for 3 s",
        "10.0%",
    ):
        assert fact in page
    assert f"&quot;requests&quot;: {len(streams)}" in page.partition("<details>")[2]


def test_only_a_noisy_page_warns(tmp_path: Path) -> None:
    for share, warns in ((0.1, False), (0.25, True)):
        write_page(tmp_path / "report.html", document([GOOD], share), [GOOD], SAMPLES)
        assert ("other processes took 25% of the machine" in (tmp_path / "report.html").read_text()) == warns


def test_pictures_say_what_they_show() -> None:
    ttft, gaps, load, _ = pictures([GOOD, LATER, REFUSED, BROKEN], SAMPLES)
    assert ttft.alt.endswith("p50 300 ms, p90 380 ms, p99 398 ms, max 400 ms.")
    assert "the gaps between them are 0 (66.7% of them)" in gaps.caption
    assert "at most 2 running, 1 waiting and 25.0 % of the KV blocks" in load.alt


def test_the_timeline_begins_with_the_first_request() -> None:
    late = StreamTimes(1.5, 3, [(1.6, 1)], 1.7)
    _, _, load, _ = pictures([late], SAMPLES)
    assert np.asarray(load.figure.axes[0].lines[0].get_xdata()).tolist() == [0.5]

"""The report's figures are those of the streams, and its page stands alone."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from loadtest.report import KV_USAGE, RUNNING, WAITING, Sample, read_streams, summarise, write_page
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


@pytest.mark.parametrize(("streams", "samples"), [([GOOD, LATER, REFUSED], SAMPLES), ([], [])])
def test_the_page_stands_alone_and_tells_the_figures(
    tmp_path: Path, streams: list[StreamTimes], samples: list[Sample]
) -> None:
    write_page(tmp_path / "report.html", {"note": "<b> & more", **summarise(streams)}, streams, samples)
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall(r"<img alt='' src='data:image/svg\+xml;base64,", page)) == 4
    assert not re.search(r"(?:src|href)=['\"](?!data:)", page)
    assert "&lt;b&gt; &amp; more" in page
    assert f"&quot;requests&quot;: {len(streams)}" in page

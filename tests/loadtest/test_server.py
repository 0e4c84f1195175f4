"""Measuring starts servers that are fresh, and says where one went wrong."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from loadtest import bench, run
from loadtest.machine import CpuTimes, noise, others_share
from loadtest.server import ServerFailed, free_ports, parse_metrics, running_server

PAGE = """# HELP quire_rejections_total Refused.
# TYPE quire_rejections_total counter
quire_rejections_total{reason="QUEUE_FULL"} 3.0
quire_rejections_total{reason="a } brace"} 4.0
quire_engine_up 1.0
"""


def test_metrics_of_one_name_are_added_up() -> None:
    assert parse_metrics(PAGE) == {"quire_rejections_total": 7.0, "quire_engine_up": 1.0}


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(5))) == 5


def test_what_others_took_is_the_busy_time_that_is_not_ours() -> None:
    assert others_share(CpuTimes(100, 50, 40), CpuTimes(120, 66, 54)) == pytest.approx(0.1)
    assert others_share(CpuTimes(100, 50, 40), CpuTimes(120, 60, 51)) == 0.0


def test_more_than_a_tenth_for_others_is_noise() -> None:
    assert noise(0.1) is None
    assert noise(0.234) == "noisy: other processes took 23% of the machine; repeat on a quiet one"


@pytest.mark.e2e
def test_a_server_that_cannot_start_is_named_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    nothing = running_server(log, ["--model", str(tmp_path / "nothing")])
    with pytest.raises(ServerFailed, match=r"while starting.*server\.log"), nothing:
        pytest.fail("it started")
    assert "nothing" in log.read_text()


@pytest.mark.e2e
def test_a_load_test_leaves_a_report_and_ends_with_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--users", "2", "--seconds", "3", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    shown = capfd.readouterr().out
    assert "\n3 s with 2 users, chat lengths\n" in shown
    assert "Aggregated" not in shown
    summary = json.loads(shown.splitlines()[-1])
    assert f"requests: {summary['requests']} (" in shown
    assert summary["command"] == shlex.join(["python", "-m", "loadtest.run", *arguments])
    counts = {entry["name"]: entry["num_requests"] for entry in json.loads((tmp_path / "locust.json").read_text())}
    assert counts.keys() == {"ttft", "itl", "e2e"}
    assert counts["e2e"] == summary["requests"]
    assert summary["failed"] == 0
    assert summary["requests"] > 0
    assert summary["output_tokens_per_second"] > 0
    assert set(summary["ttft_ms"]) == {"p50", "p90", "p99", "max"}
    assert "Quire under load" in (tmp_path / "report.html").read_text()


@pytest.mark.e2e
def test_a_bench_ends_with_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rounds", "1", "--streams", "1", "2", "--prompt", "8", "--new", "4", "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(summary["streams"]) == {"1", "2"}
    for level in summary["streams"].values():
        assert level["grpc_over_engine"]["median"] > 0
        assert level["engine"]["output_tokens_per_second"]["median"] > 0
    assert summary["shared_prefix"]["engine"]["cold_over_warm"]["median"] > 0

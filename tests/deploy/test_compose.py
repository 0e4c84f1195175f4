"""Compose and Prometheus: valid by their own tools, and pointing at each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import Settings
from service.supervisor import KILL_MARGIN_SECONDS
from tests.readme import metrics_table

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHECK = Path(sys.executable).parent / "check-jsonschema"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    composed: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return composed


def check_compose(file: Path) -> int:
    command = [str(CHECK), "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_is_valid() -> None:
    assert check_compose(DEPLOY / "compose.yaml") == 0


def test_a_misspelt_key_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text((DEPLOY / "compose.yaml").read_text().replace("read_only", "readonly"))
    assert check_compose(tmp_path / "compose.yaml") != 0


def test_ports_are_the_servers_and_only_local(services: dict[str, Any]) -> None:
    expected = [f"127.0.0.1:{port}:{port}" for port in (Settings().port, Settings().metrics_port)]
    assert services["quire"]["ports"] == expected


def test_the_container_is_read_only_and_has_time_to_drain(services: dict[str, Any]) -> None:
    quire = services["quire"]
    assert quire["read_only"] is True
    assert quire["tmpfs"] == ["/tmp"]
    assert quire["cap_drop"] == ["ALL"]
    grace = int(quire["stop_grace_period"].removesuffix("s"))
    assert grace > Settings().lame_duck_seconds + Settings().drain_seconds + KILL_MARGIN_SECONDS


def test_prometheus_scrapes_the_server(services: dict[str, Any]) -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"quire:{Settings().metrics_port}"]}]
    assert "quire" in services
    assert "./prometheus:/etc/prometheus:ro" in services["prometheus"]["volumes"]


def test_alerts_ask_for_metrics_that_exist() -> None:
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    asked = {name.removesuffix("_bucket") for name in re.findall(r"\bquire_\w+", rules)}
    assert len(asked) == 3
    assert all(f"`{name}`" in metrics_table() for name in asked)


@needs_promtool
def test_promtool_accepts_the_configuration() -> None:
    promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", str(DEPLOY / "prometheus" / "alerts_test.yml"))

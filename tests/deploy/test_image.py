"""The image: what hadolint says, and the promises of the Dockerfile that no linter knows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.config import Settings
from tests.deploy.environment import quire_settings

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = Path(sys.executable).parent / "hadolint"


@pytest.fixture(scope="module")
def stages() -> dict[str, str]:
    """Each build stage's instructions, continued lines joined and comments left out, by the stage's name."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", text)
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def run_hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    command = [str(HADOLINT), "--config", str(ROOT / ".hadolint.yaml"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_hadolint_finds_nothing() -> None:
    done = run_hadolint(ROOT / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_a_planted_mistake(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp && sudo ls\n")
    done = run_hadolint(tmp_path / "Dockerfile")
    assert done.returncode == 1
    assert "DL3007" in done.stdout


def test_cpu_is_the_default_target_and_gpu_differs_by_torchs_build_and_a_compiler(stages: dict[str, str]) -> None:
    assert list(stages)[-1] == "cpu"
    compiler, user, *rest = stages["gpu"].strip().removeprefix("USER 0:0\n").split("\n")
    assert "install --yes --no-install-recommends gcc libc6-dev" in compiler and user == "USER 10001:10001"
    assert "\n".join(rest) == stages["cpu"].replace("build-cpu", "build-gpu").strip()
    cpu, gpu = stages["build-cpu"].strip(), stages["build-gpu"].strip()
    assert gpu == cpu.replace("--torch-backend cpu", "--torch-backend cu130")


def test_the_compiler_stays_in_the_build_stage(stages: dict[str, str]) -> None:
    assert " gcc " in stages["build"]
    assert not re.search(r"\bgcc\b|\bmake\b|build-essential", stages["runtime"] + stages["cpu"])


def test_the_server_is_not_root_and_is_stopped_by_the_signal_that_drains(stages: dict[str, str]) -> None:
    runtime = stages["runtime"]
    assert "useradd --uid 10001" in runtime
    assert "\nUSER 10001:10001\n" in runtime
    assert "\nSTOPSIGNAL SIGTERM\n" in runtime
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", runtime, re.MULTILINE)[0]) == ["quire"]
    assert json.loads(re.findall(r"^HEALTHCHECK .* CMD (.*)$", runtime, re.MULTILINE)[0]) == ["quire", "health"]


def test_the_image_serves_others_and_says_so(stages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(re.findall(r"(QUIRE_\w+)=(\S+)", stages["runtime"]))
    settings = quire_settings(variables, monkeypatch)
    assert (settings.host, settings.metrics_host, settings.insecure) == ("0.0.0.0", "0.0.0.0", True)
    exposed = re.findall(r"^EXPOSE (.*)$", stages["runtime"], re.MULTILINE)[0].split()
    assert exposed == [str(Settings().port), str(Settings().metrics_port)]


def test_the_context_holds_what_is_copied(stages: dict[str, str]) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", stages["build"], re.MULTILINE)
        for name in line.split()
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in kept)


def test_versions_are_those_of_the_project(stages: dict[str, str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    torch = re.findall(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE)[0]
    assert stages["build-cpu"].split()[-1] == torch
    uv = re.findall(r"uv==\S+", stages["build"])[0]
    assert uv in re.findall(r"^uv==[^ ]+", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE)

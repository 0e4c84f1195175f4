"""The repository as a whole: locks, generated code, make's targets, the list of settings. Not what any room does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from service.config import Settings

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements.lock", "requirements-dev.lock")
MAKEFILE = (ROOT / "Makefile").read_text()

SETTINGS = """
model model_name host port insecure metrics_host metrics_port reflection
dtype quantize backend cpu_level threads pin_threads context_length block_size kv_cache_mib num_blocks prefix_cache
graphs gpu_attention max_num_seqs max_batch_tokens target_itl_ms
max_waiting_requests max_waiting_tokens default_deadline_seconds max_deadline_seconds reader_stall_seconds
lame_duck_seconds drain_seconds engine_timeout_seconds max_engine_restarts log_level log_format
""".split()


def test_a_new_setting_is_argued_for() -> None:
    """A change here is a decision, not a detail: could the right value be found out instead?"""
    assert list(Settings.model_fields) == SETTINGS


def pins(lock: str) -> dict[str, set[str]]:
    """Versions by package; more than one where they depend on Python's."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9.-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_leave_torch_to_the_machine_and_name_no_index(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert not re.search(r"^(torch|nvidia)", text, re.MULTILINE)
    assert "://" not in text


def test_triton_is_for_development_only() -> None:
    """A server with a card runs the one that came with its torch."""
    assert ["triton" in pins(lock) for lock in LOCKS] == [False, True]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_a_hash(lock: str) -> None:
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", (ROOT / lock).read_text(), flags=re.MULTILINE))
    assert len(entries) > 30
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_development_lock_has_the_servers_versions() -> None:
    runtime, development = (pins(lock) for lock in LOCKS)
    assert runtime.items() <= development.items()


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirements, lock in (
        (project["dependencies"], LOCKS[0]),
        (project["optional-dependencies"]["dev"], LOCKS[1]),
    ):
        names = {re.split(r"[<>=;]", requirement)[0].strip() for requirement in requirements}
        assert names - {"torch"} <= set(pins(lock))


def test_stubs_are_what_the_proto_generates(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-Iservice/pb=proto",
        *outputs,
        "proto/quire/v1/inference.proto",
    ]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    generated = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(generated) == 3
    for path in generated:
        assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text(), f"{path.name}: run make proto"


def test_packages_have_empty_init_files() -> None:
    files = [path for room in ("model", "service", "loadtest") for path in (ROOT / room).rglob("__init__.py")]
    assert len(files) > 8
    assert [path for path in files if path.stat().st_size] == []


def test_help_lists_every_target_that_people_call() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    listed = re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE)
    assert (
        listed
        == "help serve test test-slow lint kernels-check gpu-check bench loadtest proto lock native clean".split()
    )
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split()
    assert set(listed) <= set(phony)


@pytest.mark.parametrize(
    "target",
    [
        "serve",
        "test",
        "test-slow",
        "lint",
        "kernels-check",
        "gpu-check",
        "bench",
        "loadtest",
        "proto",
        "lock",
        "native",
    ],
)
def test_targets_can_be_resolved(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_machine_without_a_new_enough_python_is_told_so(tmp_path: Path) -> None:
    old_python = tmp_path / "python"
    old_python.write_text("#!/bin/sh\nexit 1\n")
    old_python.chmod(0o755)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    command = ["make", "native", f"PYTHON={old_python}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode != 0
    assert "older than 3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_is_a_script_that_can_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)

"""The comparison's loop with runners that answer at once: alternation, repeats, failures, and what a file keeps."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from loadtest import bench_cpu
from loadtest.bench_cpu import (
    ENGINES,
    RUN_SECONDS,
    Plan,
    RunFailed,
    cells_of,
    command_of,
    last_document,
    limits_of,
    parse,
    read,
    run,
    summary,
)
from loadtest.cpu_table import Cell

CELL = Cell("M", "W2", 8, "bf16")
LIMITS = {
    "memory_bytes_per_second": 4e10,
    "l3_bytes_per_second": 2e11,
    "l3_bytes": 2.0**25,
    "bf16_flops": 4e11,
    "fp32_flops": 2e11,
    "int8_ops": None,
}
CONFIG = {
    "vocab_size": 1000,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


def plan_of(folder: Path, engines: tuple[str, ...] = ("quire", "llamacpp"), cells: tuple[Cell, ...] = (CELL,)) -> Plan:
    (folder / "M").mkdir()
    (folder / "M" / "config.json").write_text(json.dumps(CONFIG))
    return Plan(folder, cells, engines, rounds=2, repeat=3, tries=3, threads=2, out=folder / "out" / "found.jsonl")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting and no measuring of the machine; others take what the list says, then nothing."""
    shares: list[float] = []
    monkeypatch.setattr(bench_cpu, "wait_for_quiet", lambda: None)
    monkeypatch.setattr(bench_cpu, "measure_all", lambda threads: dict.fromkeys(threads, LIMITS))
    monkeypatch.setattr(bench_cpu, "others_share", lambda before, after: shares.pop(0) if shares else 0.0)
    return shares


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runners that give a figure at once; the modules that were called, in order."""
    called: list[str] = []

    def give(command: list[str], max_seconds: float) -> dict[str, object]:
        assert max_seconds == 3 * RUN_SECONDS
        called.append(command[2].rpartition(".")[2])
        rate = 20.0 if called[-1] == "quire" else 10.0
        return {"figures": {"output_tokens_per_second": rate}, "version": "1", "settings": {}}

    monkeypatch.setattr(bench_cpu, "run", give)
    return called


def test_cells_are_all_combinations_in_order() -> None:
    cells = list(cells_of(["S", "M"], ["W1", "W2/32"], ["bf16", "int8"]))
    assert [cell.title for cell in cells[:4]] == ["S W1 bf16", "S W1 int8", "S W2 at 32 bf16", "S W2 at 32 int8"]
    assert [cell.model for cell in cells] == ["S"] * 4 + ["M"] * 4
    assert next(cells_of(["M"], ["W3"], ["bf16"])).batch == 64


@pytest.mark.parametrize(
    "arguments",
    [["--work", "W7"], ["--work", "W2/0"], ["--work", "W2/x"], ["--repeat", "0"], ["--rounds", "0"]],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2


def test_the_command_line_gives_a_plan_or_a_file(tmp_path: Path) -> None:
    plan = parse(["--model", "S", "--work", "W1", "--engines", "quire", "--out", str(tmp_path / "x.jsonl")])
    assert isinstance(plan, Plan)
    assert [cell.title for cell in plan.cells] == ["S W1 bf16", "S W1 int8"]
    assert parse(["--table", "some.jsonl"]) == Path("some.jsonl")


def test_engines_alternate(tmp_path: Path, quiet: list[float], commands: list[str]) -> None:
    plan = plan_of(tmp_path)
    bench_cpu.measure(plan)
    assert commands == ["quire", "llamacpp"] * 2
    document, table = summary(read(plan.out))
    assert document["rows"][0]["ratio"]["median"] == 2.0
    assert document["rows"][0]["limit"] > 0
    assert document["sessions"][0]["repeat"] == 3
    assert "M W2 at 8 bf16" in table


def test_a_second_session_adds_rounds(tmp_path: Path, quiet: list[float], commands: list[str]) -> None:
    plan = plan_of(tmp_path, engines=("quire",))
    bench_cpu.measure(plan)
    bench_cpu.measure(plan)
    assert [record["run"]["round"] for record in read(plan.out) if "run" in record] == [1, 2, 3, 4]


def test_a_runs_share_is_of_its_own_sessions_limits(
    tmp_path: Path, quiet: list[float], commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plan_of(tmp_path, engines=("quire",)), rounds=1)
    rates = iter([100.0, 40.0])
    monkeypatch.setattr(bench_cpu, "limits_of", lambda *_: {"output_tokens_per_second": next(rates)})
    bench_cpu.measure(plan)
    bench_cpu.measure(plan)
    document, _ = summary(read(plan.out))
    [row] = document["rows"]  # 20 tokens a second in both
    assert (row["limit"], row["share_of_limit"]) == (70.0, 0.35)


def test_a_noisy_run_is_repeated_but_not_for_ever(tmp_path: Path, quiet: list[float], commands: list[str]) -> None:
    plan = plan_of(tmp_path, engines=("quire",))
    quiet.extend([0.5, 0.05, 0.5, 0.4, 0.3])
    bench_cpu.measure(plan)
    assert len(commands) == 2 + 3
    document, _ = summary(read(plan.out))
    assert document["rows"][0]["num_noisy"] == {"quire": 1}


def test_a_failure_is_kept_and_the_rest_goes_on(
    tmp_path: Path, quiet: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], max_seconds: float) -> dict[str, object]:
        raise RunFailed("no such engine")

    monkeypatch.setattr(bench_cpu, "run", fail)
    plan = plan_of(tmp_path)
    bench_cpu.measure(plan)
    document, _ = summary(read(plan.out))
    assert [failure["engine"] for failure in document["failures"]] == ["quire", "llamacpp"] * 2
    assert document["rows"] == []


def test_engines_skip_what_they_cannot_measure(tmp_path: Path, quiet: list[float], commands: list[str]) -> None:
    cells = [Cell("M", workload, 8, precision) for workload in ("W2", "W5") for precision in ("bf16", "int8")]
    plan = replace(plan_of(tmp_path, engines=("transformers",), cells=tuple(cells)), rounds=1)
    bench_cpu.measure(plan)
    assert [record["run"]["cell"] for record in read(plan.out) if "run" in record] == [asdict(CELL)]


def test_a_file_that_was_cut_short_keeps_what_it_has(tmp_path: Path, quiet: list[float], commands: list[str]) -> None:
    plan = plan_of(tmp_path)
    bench_cpu.measure(plan)
    text = plan.out.read_text()
    plan.out.write_text(text[:-5])
    assert len(read(plan.out)) == len(text.splitlines()) - 1
    document, _ = summary(read(plan.out))
    assert document["rows"]


def test_a_machine_that_cannot_say_sets_no_limits() -> None:
    assert limits_of(Cell("M", "W2", 8, "int8"), CONFIG, LIMITS) == {}
    assert limits_of(CELL, CONFIG, LIMITS)["output_tokens_per_second"] > 0


def test_a_runner_is_called_with_the_cell(tmp_path: Path) -> None:
    command = command_of(plan_of(tmp_path), CELL, ENGINES["quire-grpc"])
    assert command[:3] == [sys.executable, "-m", "loadtest.peers.quire"]
    assert command[command.index("--batch") + 1] == "8"
    assert command[command.index("--repeat") + 1] == "3"
    assert command[-2:] == ["--set", "way=grpc"]


def test_a_runner_gives_its_last_line() -> None:
    code = "print('loading'); print('{\"figures\": {}}')"
    assert run([sys.executable, "-c", code], RUN_SECONDS) == {"figures": {}}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, "-c", "raise SystemExit('out of memory')"], "out of memory"),
        ([sys.executable, "-c", "pass"], "no document"),
        (["/no/such/python"], "No such file"),
    ],
)
def test_a_runner_that_fails_says_why(command: list[str], message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        run(command, RUN_SECONDS)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_runner_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no result"):
        run(["/bin/sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; wait"], max_seconds=1.0)
    child = int((tmp_path / "child").read_text())
    for _ in range(200):  # until the system has taken it away
        if not is_running(child):
            return
        time.sleep(0.05)
    raise AssertionError("the child goes on")


@pytest.mark.parametrize("output", ["", "text", "[1]", '{"other": 1}'])
def test_a_last_line_that_is_no_document_is_a_failure(output: str) -> None:
    with pytest.raises(RunFailed, match="no document"):
        last_document(output)

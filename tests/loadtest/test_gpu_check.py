"""The check of a card without one: parts that fail, hang or lack something, the time that is left, and what is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtest.gpu import check, parts, processes
from loadtest.gpu.check import LEAST_SECONDS, Plan, Result, Status, command_of, main, parse, run_parts
from loadtest.gpu.parts import PARTS, Part
from loadtest.gpu.records import Records, parse_part, read_records
from loadtest.gpu.summary import Verdict, as_text, verdicts_of
from loadtest.machine import ROOT

GOOD = "print('all is well')"
BAD = "import sys; print('on the way'); sys.exit('it broke')"
HANGING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in the place of real ones: modules that Python finds."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in {"good_part": GOOD, "bad_part": BAD, "hanging_part": HANGING}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def part_of(name: str, limit_seconds: float = 30.0, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, limit_seconds, f"{name}_part", needs=needs)


def plan_of(folder: Path, *listed: Part, is_dry: bool = False) -> Plan:
    return Plan(listed, folder, folder / "models", 60.0, is_dry)


def has_ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def run_all(plan: Plan, seconds: float = 60.0) -> list[Result]:
    return run_parts(plan, time.monotonic() + seconds)


@pytest.mark.usefixtures("modules")
def test_a_part_that_fails_hides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_all(plan_of(tmp_path, part_of("bad"), part_of("good")))
    assert [(result.part, result.status) for result in results] == [("bad", Status.FAILED), ("good", Status.OK)]
    assert results[0].why == "exit code 1: it broke"
    said = capsys.readouterr().out
    assert "on the way" in said and "all is well" in said
    log = (tmp_path / "gpu-check.log").read_text()
    assert log.splitlines() == ["== bad", "on the way", "it broke", "== good", "all is well"]


@pytest.mark.usefixtures("modules")
def test_a_part_over_its_time_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LEAST_SECONDS", 0.1)
    results = run_all(plan_of(tmp_path, part_of("hanging", 1.5), part_of("good")))
    assert [result.status for result in results] == [Status.OVER_TIME, Status.OK]
    child = int((tmp_path / "gpu-check.log").read_text().splitlines()[1])
    deadline = time.monotonic() + 10
    while not has_ended(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended(child)


def test_limits_are_cut_as_the_end_comes_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limits = [0.0], []

    def run(plan: Plan, part: Part, limit: float) -> Result:
        limits.append((part.name, limit))
        clock[0] += min(limit, 20.0)
        return Result(part.name, Status.OK)

    monkeypatch.setattr(check, "run_part", run)
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    run_parts(plan_of(tmp_path, part_of("a", 30), part_of("b", 30), part_of("c", 30)), 45.0)
    assert limits == [("a", 30), ("b", 25), ("c", 5)]


def test_a_part_for_which_no_time_is_left_is_a_failure(tmp_path: Path) -> None:
    (result,) = run_all(plan_of(tmp_path, part_of("good")), LEAST_SECONDS - 1)
    assert result.status is Status.NOT_REACHED and not result.is_good


def test_what_a_machine_lacks_is_named_and_no_failure(tmp_path: Path) -> None:
    lacking = part_of("good", needs=("json", "no_such_module", "no_such_package.part"))
    compiled = Part("native", 30, "good_part", programs=("no-such-compiler",), needs=())
    dry = Part("native", 30, "good_part", runs_dry=False)
    (result,) = run_all(plan_of(tmp_path, lacking))
    assert result.why == "Python here has no no_such_module, no_such_package.part" and result.is_good
    assert run_all(plan_of(tmp_path, compiled))[0].status is Status.SKIPPED
    assert run_all(plan_of(tmp_path, dry, is_dry=True))[0].status is Status.SKIPPED


def test_parts_are_told_where_to_write_and_how_long_they_have(tmp_path: Path) -> None:
    command = command_of(plan_of(tmp_path, is_dry=True), PARTS[0], 12.4)
    assert command[:3] == [sys.executable, "-m", "loadtest.gpu.limits"]
    options = parse_part("limits", command[3:])
    assert options.is_dry and options.records.file == tmp_path / "gpu-check.jsonl"
    assert 11 < options.left() <= 12.5
    assert command_of(plan_of(tmp_path), part_of("good"), 12.0) == [sys.executable, "-m", "good_part"]


def test_kernels_are_interpreted_in_a_dry_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(*_: object, environment: dict[str, str], **__: object) -> processes.Ended:
        seen.append(environment["TRITON_INTERPRET"])
        return processes.Ended(0, 0.0, "")

    monkeypatch.setattr(check, "run", run)
    for is_dry in (True, False):
        run_all(plan_of(tmp_path, Part("x", 30, "x", needs=()), is_dry=is_dry))
    assert seen == ["1", "0"]


def test_every_part_is_a_module_that_is_there_and_the_whole_has_time_for_half_of_each() -> None:
    assert all(parts.is_importable(part.module) for part in PARTS)
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert sum(part.limit_seconds for part in PARTS) / 2 <= parse([]).seconds <= 9 * 60
    order = [part.name.split()[0] for part in PARTS]
    wanted = "limits tests attention products operators sampler models steps logits engine transformers grpc".split()
    assert sorted(wanted, key=order.index) == wanted


def test_parts_can_be_chosen_by_name_and_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert [part.name for part in parse(["--only", "steps", "limits", "engine 1B"]).parts] == [
        "limits",
        "steps 8B",
        "steps 1B",
        "engine 1B",
    ]
    with pytest.raises(SystemExit) as end:
        parse(["--only", "steps", "nonsense"])
    assert end.value.code == 2
    assert "no such part: nonsense" in capsys.readouterr().err


def test_results_go_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert parse([]).out == tmp_path
    monkeypatch.delenv("OUT")
    assert parse([]).out.parts[-3:] == ("loadtest", "out", "gpu")


def test_without_a_card_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a card here")
    assert main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and not (tmp_path / "out").exists()
    assert said.err == "gpu-check: torch finds no NVIDIA card; --dry runs tiny shapes on the CPU\n"


@pytest.mark.usefixtures("modules")
def test_the_last_line_is_a_document_and_the_exit_code_tells_of_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "find_card", lambda: {"name": "a card"})
    for listed, code in (([part_of("good")], 0), ([part_of("good"), part_of("bad")], 1)):
        monkeypatch.setattr(check, "PARTS", tuple(listed))
        monkeypatch.setattr(check, "verdicts_of", lambda records: [Verdict("speed", 0.9, 0.85, True)])
        assert main(["--out", str(tmp_path)]) == code
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["card"] == {"name": "a card"}
        assert [part["status"] for part in document["parts"]] == ["ok", "failed"][: len(listed)]
        assert document["goals"] == [{"name": "speed", "measured": 0.9, "goal": 0.85, "is_met": True}]


def test_records_survive_a_part_that_is_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    assert read_records(file) == []
    Records(file, "a").write("limits", rate=1234567.89, name="x", shares={"y": 0.123456789})
    with file.open("a") as stream:
        stream.write('{"part": "b", "kind')
    assert read_records(file) == [
        {"part": "a", "kind": "limits", "rate": 1234570.0, "name": "x", "shares": {"y": 0.123457}}
    ]


def workload(engine: str, rate: float) -> dict[str, object]:
    name = {"kind": "workload", "model": "8B", "workload": "W2", "batch": 64}
    return name | {"engine": engine, "output_tokens_per_second": rate}


def decode(model: str, batch: int, share: float) -> dict[str, object]:
    name = {"kind": "decode", "model": model, "batch": batch}
    return name | {"share": share, "ms": 10.0, "limit_ms": 9.0, "alone_ms": 11.0}


def products(way: str, rows: int, ms: float, has_own_bits: bool = True) -> dict[str, object]:
    name = {"kind": "products of a step", "model": "8B", "way": way, "rows": rows}
    return name | {"ms": ms, "has_bits_of_alone": has_own_bits}


def test_goals_are_judged_by_what_was_measured() -> None:
    records = [
        {"kind": "operator", "is_right": True},
        {"kind": "attention", "is_right": False},
        {"kind": "test", "name": "tests/gpu/test_x.py::test_y", "outcome": "failed"},
        {"kind": "test", "name": "tests/gpu/test_x.py::test_z", "outcome": "passed"},
        decode("8B", 1, 0.84),
        decode("8B", 32, 0.86),
        decode("1B", 1, 0.71),
        {"kind": "prefill", "model": "8B", "tokens": 8192, "share": 0.7, "ms": 200.0, "limit_ms": 140.0},
        {"kind": "prefill", "model": "8B", "tokens": 1024, "share": 0.1, "ms": 200.0, "limit_ms": 20.0},
        *(products("torch", rows, 8.0, has_own_bits=False) for rows in (1, 32)),
        *(products("padded", rows, 8.1, has_own_bits=rows > 1) for rows in (1, 32)),
        *(products("tiles", rows, 8.6) for rows in (1, 32)),
        *(products("one tile", rows, 9.6) for rows in (1, 32)),
        workload("quire", 100.0),
        workload("quire through gRPC", 94.0),
        workload("transformers", 25.0),
        {"kind": "ready", "model": "8B", "seconds": 10.5},
        {"kind": "ready", "model": "1B", "seconds": 20.0},
    ]
    found = {verdict.name: (verdict.measured, verdict.is_met) for verdict in verdicts_of(records)}
    assert found == {
        "wrong results": (1, False),
        "failed tests": (1, False),
        "decode 8B at 1": (0.84, False),
        "decode 8B at 32": (0.86, True),
        "decode 1B at 1": (0.71, True),
        "prefill 8B of 8192": (0.7, True),
        "reproducible products 8B at 1: cost": (pytest.approx(0.06), True),
        "reproducible products 8B at 32: cost": (pytest.approx(0.06), False),
        "W2 8B at 64 by transformers": (4.0, True),
        "W2 8B at 64: gRPC by engine": (0.94, False),
        "ready 8B, seconds": (10.5, False),
    }


def test_what_was_not_measured_is_not_judged() -> None:
    assert verdicts_of([workload("transformers", 50.0), products("tiles", 1, 8.0)]) == []


def test_the_table_has_a_line_for_each_part_and_goal() -> None:
    results = [Result("limits", Status.OK, 3.0), Result("grpc 8B", Status.SKIPPED, why="Python here has no msgspec")]
    text = as_text(results, [Verdict("decode 8B at 1", 0.8, 0.85, True, "4.4 ms"), Verdict("ready", 9.0, 10.0, False)])
    lines = [line.split(maxsplit=3) for line in text.splitlines() if line.startswith("  ")]
    assert lines[0] == ["limits", "3.0", "s", "ok"]
    assert "skipped  Python here has no msgspec" in text
    assert "decode 8B at 1  MISSED     0.800  at least 0.85  4.4 ms" in text
    assert "ready           met        9.000  at most 10" in text


@pytest.mark.slow
def test_a_dry_run_works_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    chosen = ["limits", "attention", "models"]
    folders = ["--out", str(tmp_path), "--models", str(tmp_path / "models")]
    assert main(["--dry", *folders, "--only", *chosen]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [part["part"] for part in document["parts"]] == chosen
    assert document["goals"] == []
    records = read_records(tmp_path / "gpu-check.jsonl")
    assert [record["part"] for record in records] == ["limits", *["attention"] * 3, "models", "models"]
    left_out = [(record["by"], record["why"]) for record in records if record["kind"] == "attention left out"]
    assert left_out == [("flash-attention-3", "there is no card in a dry run")]
    assert all(record["is_right"] for record in records if record["kind"] == "attention")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_dry_run_of_everything_works_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folders = ["--out", str(tmp_path), "--models", str(tmp_path / "models")]
    assert main(["--dry", *folders]) == 0
    found = {record["part"] for record in read_records(tmp_path / "gpu-check.jsonl")}
    assert found == {part.name for part in PARTS if part.runs_dry} - {"tests"}


OFTEN_MISSING = {"msgspec", "pydantic", "grpc", "grpc_health", "grpc_reflection"}
IMPORT = (
    "import sys, importlib; sys.modules.update(dict.fromkeys({without})); [*map(importlib.import_module, {modules})]"
)
NEEDS = sorted({part.needs for part in PARTS if part.takes_options})


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: needs[-1])
def test_a_part_imports_nothing_that_it_does_not_say_it_needs(needs: tuple[str, ...]) -> None:
    """The image of a card's machine lacks some of these: then a part that needs them is skipped, and no other fails."""
    some = [part for part in PARTS if part.takes_options and part.needs == needs]
    if (missing := some[0].missing()) is not None:
        pytest.skip(missing)
    code = IMPORT.format(without=sorted(OFTEN_MISSING - set(needs)), modules=sorted({part.module for part in some}))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]

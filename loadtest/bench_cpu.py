"""Quire and its peers on the same work on a CPU, alternating: who is faster, by how much, and how far from the limit.

    python -m loadtest.bench_cpu --models DIR [--model M] [--work W1 W2/8 W2/32 W2/64 W3 W5] [--precisions bf16 int8]
        [--engines quire quire-grpc llamacpp openvino transformers] [--rounds 3] [--repeat 3] [--tries 3] [--threads N]
        [--out FILE]
    python -m loadtest.bench_cpu --table FILE

Each round runs every engine on every piece of work, one after the other, each in a process of its own (loadtest/peers)
that measures `--repeat` times and gives the medians: some runs last half a second only, in which one hiccup is a lot.
A run during which other processes took more than a tenth of the machine is repeated, a bounded number of times. Every
result is appended to a JSONL file at once; `--table` prints a file's table again. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.cpu_table import OURS, OURS_THROUGH_GRPC, Cell, Measurement, as_markdown, rows_of
from loadtest.limits import Limits, measure_all
from loadtest.machine import OUT, ROOT, TOLERATED_SHARE, cpu_times, describe, others_share
from loadtest.peers.runner import PRECISIONS, WORK
from loadtest.peers.works import DEFAULT_BATCH, works_of
from loadtest.roofline import MachineRates, ModelCost, least_figures, least_time

RUN_SECONDS = 600.0
"""How long a run may take for each of its measurements."""
QUIET_SECONDS = 30.0
"""How long to wait for others to leave the machine before a run."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine's runner is called."""

    module: str
    python: str = sys.executable
    arguments: tuple[str, ...] = ()
    workloads: tuple[str, ...] = tuple(DEFAULT_BATCH)
    precisions: tuple[str, ...] = PRECISIONS

    def offers(self, cell: Cell) -> bool:
        """Whether its runner can measure this."""
        return cell.workload in self.workloads and cell.precision in self.precisions


ENGINES = {
    OURS: Engine("quire"),
    OURS_THROUGH_GRPC: Engine("quire", arguments=("--set", "way=grpc")),
    "llamacpp": Engine("llamacpp"),
    "openvino": Engine("openvino", os.environ.get("OPENVINO_PYTHON", str(WORK / "openvino" / "bin" / "python"))),
    "transformers": Engine("transformers", workloads=("W1", "W2", "W3"), precisions=("bf16", "fp32")),
}


class RunFailed(Exception):
    """A runner ended badly; the message is the end of what it said."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, in order."""

    models: Path
    cells: tuple[Cell, ...]
    engines: tuple[str, ...]
    rounds: int
    repeat: int
    tries: int
    threads: int
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, or reads what was measured, and prints. Returns the exit code."""
    given = parse(arguments)
    if isinstance(given, Plan):
        measure(given)
        records = read(given.out)
    else:
        records = read(given)
    show(records)
    return 0


def parse(arguments: Sequence[str] | None) -> Plan | Path:
    """The command line: a plan, or the file whose table is wanted. Exits with 2 for mistakes."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a file and measure nothing")
    parser.add_argument("--models", type=Path, default=WORK / "models", help="folder of the models")
    parser.add_argument("--model", nargs="+", default=["M"], help="their names (default: M)")
    parser.add_argument("--work", nargs="+", default=["W1", "W2/8", "W2/32", "W2/64", "W3", "W5"], metavar="W[/BATCH]")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "int8"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each run (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=3, help="runs of a noisy measurement (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSONL file to append to (default: a new one in loadtest/out)")
    given = parser.parse_args(arguments)
    if given.table:
        return Path(given.table)
    if min(given.rounds, given.repeat, given.tries, given.threads) < 1:
        parser.error("rounds, repeat, tries and threads must be at least 1")
    try:
        cells = tuple(cells_of(given.model, given.work, given.precisions))
    except ValueError as error:
        parser.error(f"--work: {error}")
    out = given.out or OUT / f"cpu-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
    return Plan(given.models, cells, tuple(given.engines), given.rounds, given.repeat, given.tries, given.threads, out)


def cells_of(models: Sequence[str], work: Sequence[str], precisions: Sequence[str]) -> Iterator[Cell]:
    """Every combination. Raises ValueError for work that is not like W1 or W2/32."""
    for model in models:
        for name in work:
            workload, _, batch = name.partition("/")
            if workload not in DEFAULT_BATCH or (batch and not (batch.isdigit() and int(batch))):
                raise ValueError(f"{name!r} is not one of {' '.join(DEFAULT_BATCH)}, or with a batch: W2/32")
            for precision in precisions:
                yield Cell(model, workload, int(batch or DEFAULT_BATCH[workload]), precision)


def measure(plan: Plan) -> None:
    """All rounds, numbered on from those that the plan's file has; everything found is in the file."""
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"writing {plan.out}", flush=True)
    earlier = read(plan.out) if plan.out.exists() else []
    first = 1 + max((record["run"]["round"] for record in earlier if "run" in record), default=0)
    append(plan.out, {"session": session(plan)})
    for number in range(first, first + plan.rounds):
        for cell in plan.cells:
            for name in plan.engines:
                if ENGINES[name].offers(cell):
                    measure_quietly(plan, number, cell, name)


def session(plan: Plan) -> dict[str, Any]:
    """Where and when, with the machine's limits and what they mean for each cell."""
    rates = measure_all([plan.threads])[plan.threads]
    configs = {cell.model: json.loads((plan.models / cell.model / "config.json").read_text()) for cell in plan.cells}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": describe(),
        "threads": plan.threads,
        "repeat": plan.repeat,
        "limits": rates,
        "cells": [{"cell": asdict(cell), "limits": limits_of(cell, configs[cell.model], rates)} for cell in plan.cells],
    }


def limits_of(cell: Cell, config: Mapping[str, Any], limits: Limits) -> dict[str, float]:
    """The best that each figure could be here with a cell's weights as they are; empty where the machine cannot say."""
    cost = ModelCost.from_config(config)
    rates = MachineRates.of(limits, cell.precision, cost.weight_bytes(cell.precision))
    if rates is None:
        return {}
    works = works_of(cell.workload, cell.batch, config["vocab_size"])
    return least_figures(cell.workload, least_time(cost, rates, cell.precision, works), works)


def measure_quietly(plan: Plan, number: int, cell: Cell, name: str) -> None:
    """One engine's turn, repeated while others disturb it. A failure is noted and ends the turn."""
    for _ in range(plan.tries):
        wait_for_quiet()
        before = cpu_times()
        try:
            found = run(command_of(plan, cell, ENGINES[name]), RUN_SECONDS * plan.repeat)
        except RunFailed as failure:
            print(f"round {number}  {cell.title:16} {name:12} failed: {failure}", flush=True)
            append(plan.out, {"failure": {"engine": name, "cell": asdict(cell), "message": str(failure)}})
            return
        share = round(others_share(before, cpu_times()), 3)
        measurement = Measurement(cell, name, number, share, found["figures"])
        append(plan.out, {"run": measurement.as_record(), "version": found["version"], "settings": found["settings"]})
        figures = "  ".join(f"{key} {value:,.2f}" for key, value in found["figures"].items())
        print(f"round {number}  {cell.title:16} {name:12} others {share:4.0%}  {figures}", flush=True)
        if not measurement.is_noisy:
            return


def wait_for_quiet() -> None:
    """Returns once others leave the machine alone, or when that takes too long."""
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        before = cpu_times()
        time.sleep(0.5)
        if others_share(before, cpu_times()) <= TOLERATED_SHARE:
            return


def command_of(plan: Plan, cell: Cell, engine: Engine) -> list[str]:
    """The runner's command line."""
    return [
        *(engine.python, "-m", f"loadtest.peers.{engine.module}", "--model", str((plan.models / cell.model).resolve())),
        *("--precision", cell.precision, "--workload", cell.workload, "--batch", str(cell.batch)),
        *("--threads", str(plan.threads), "--repeat", str(plan.repeat), *engine.arguments),
    ]


def run(command: Sequence[str], max_seconds: float) -> dict[str, Any]:
    """Runs a runner. Returns the document of its last line; raises RunFailed."""
    try:
        # A session of its own, so that a runner that must be ended takes its servers with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as error:
        raise RunFailed(str(error)) from None
    try:
        output, complaint = process.communicate(timeout=max_seconds)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"no result after {max_seconds:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise RunFailed((complaint.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    return last_document(output)


def last_document(output: str) -> dict[str, Any]:
    """The JSON document of the last line. Raises RunFailed if it is none."""
    try:
        document = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        document = None
    if not isinstance(document, dict) or "figures" not in document:
        raise RunFailed(f"no document in the last line of {output[-200:]!r}")
    return document


def append(path: Path, record: dict[str, Any]) -> None:
    """One line more."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All lines; one that an interruption cut short is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def show(records: Sequence[dict[str, Any]]) -> None:
    """Prints the table, then the document."""
    document, table = summary(records)
    print(table)
    print(json.dumps(document))


def summary(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """The document and the table of a file's records."""
    sessions = [record["session"] for record in records if "session" in record]
    measurements = [Measurement.from_record(record["run"]) for record in records if "run" in record]
    rows = rows_of(measurements, limits_of_rounds(records))
    versions = {record["run"]["engine"]: record["version"] for record in records if "run" in record}
    document = {
        "bench": "peers on a CPU",
        "sessions": [{key: value for key, value in session.items() if key != "cells"} for session in sessions],
        "versions": versions,
        "failures": [record["failure"] for record in records if "failure" in record],
        "rows": [row.as_record() for row in rows],
    }
    return document, as_markdown(rows)


def limits_of_rounds(records: Iterable[Mapping[str, Any]]) -> dict[tuple[Cell, int], dict[str, float]]:
    """The limits of each cell and round, of the session before its runs: a machine is not the same on another day."""
    of_session: dict[Cell, dict[str, float]] = {}
    found = {}
    for record in records:
        if "session" in record:
            of_session = {Cell(**entry["cell"]): entry["limits"] for entry in record["session"]["cells"]}
        elif "run" in record:
            measurement = Measurement.from_record(record["run"])
            found[measurement.cell, measurement.round] = of_session.get(measurement.cell, {})
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Everything that there is to measure on a card, in one call of under nine minutes.

    python -m loadtest.gpu.check [--out DIR] [--seconds 520] [--only PART ...] [--dry]

Each part (loadtest/gpu/parts.py) is a process of its own with a limit of its own, so that one failure hides nothing
else. What they find is in DIR/gpu-check.jsonl, a line as it comes; what they say, in DIR/gpu-check.log. As the end of
the call comes near, limits are cut. The last line of output is one JSON document. Exits with 1 if a part failed or was
not reached, with 2 where there is no card; --dry runs tiny shapes on the CPU, which proves that every part works.

Standard library only: whatever may be missing or broken on a machine with a card is met in a part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from loadtest.gpu.parts import PARTS, Part
from loadtest.gpu.processes import run
from loadtest.gpu.records import read_records
from loadtest.gpu.summary import as_document, as_text, verdicts_of

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 8.0
"""A part that would get less is not begun."""
PROBE_SECONDS = 60.0


class Status(StrEnum):
    """What became of a part."""

    OK = "ok"
    FAILED = "failed"
    OVER_TIME = "over time"
    NOT_REACHED = "not reached"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """A part's end."""

    part: str
    status: Status
    seconds: float = 0.0
    why: str = ""

    @property
    def is_good(self) -> bool:
        """What a machine lacks is nobody's failure; what there was no time for, is."""
        return self.status in (Status.OK, Status.SKIPPED)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and where."""

    parts: tuple[Part, ...]
    out: Path
    models: Path
    seconds: float
    is_dry: bool

    @property
    def records(self) -> Path:
        """Where the parts write."""
        return self.out / "gpu-check.jsonl"

    @property
    def log(self) -> Path:
        """What the parts said."""
        return self.out / "gpu-check.log"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts and prints the summary. Returns the exit code."""
    started_at = time.monotonic()
    plan = parse(arguments)
    card = {"name": "none: a dry run on the CPU"} if plan.is_dry else find_card()
    if isinstance(card, str):
        print(f"gpu-check: {card}; --dry runs tiny shapes on the CPU", file=sys.stderr)
        return 2
    plan.out.mkdir(parents=True, exist_ok=True)
    for file in (plan.records, plan.log):
        file.unlink(missing_ok=True)
    print(f"card: {card['name']}; writing {plan.records}", flush=True)
    results = run_parts(plan, started_at + plan.seconds)
    # Of tiny shapes on a CPU, no figure means anything.
    verdicts = [] if plan.is_dry else verdicts_of(read_records(plan.records))
    print(as_text(results, verdicts))
    document = {
        "bench": "gpu-check",
        "card": card,
        "seconds": round(time.monotonic() - started_at, 1),
        "parts": [asdict(result) for result in results],
        "goals": [as_document(verdict) for verdict in verdicts],
    }
    print(json.dumps(document), flush=True)
    return 0 if all(result.is_good for result in results) else 1


def parse(arguments: Sequence[str] | None) -> Plan:
    """The command line. Exits with 2 for mistakes."""
    names = [part.name for part in PARTS]
    out = Path(os.environ.get("OUT") or ROOT / "loadtest" / "out" / "gpu")
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=out, help="folder of the results (default: $OUT or loadtest/out/gpu)"
    )
    parser.add_argument("--models", type=Path, help="folder of the models, written once (default: loadtest/out/models)")
    parser.add_argument("--seconds", type=float, default=520.0, help="time for everything (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU; needs no card")
    given = parser.parse_args(arguments)
    wanted = [name for only in given.only for name in names if only in (name, name.split()[0])]
    if unknown := [only for only in given.only if only not in {*names, *(name.split()[0] for name in names)}]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(names)}")
    parts = tuple(part for part in PARTS if part.name in wanted)
    models = given.models or ROOT / "loadtest" / "out" / ("models-dry" if given.dry else "models")
    return Plan(parts, given.out.resolve(), models.resolve(), given.seconds, given.dry)


def find_card() -> dict[str, Any] | str:
    """What torch tells of the card, or why there is none to use."""
    command = [sys.executable, "-m", "loadtest.gpu.card"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"torch did not tell of a card within {PROBE_SECONDS:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"looking for a card ended with {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_parts(plan: Plan, deadline: float) -> list[Result]:
    """All parts in order, whatever becomes of any; `deadline` is in seconds of time.monotonic."""
    results = []
    for number, part in enumerate(plan.parts, 1):
        left = deadline - time.monotonic()
        limit = min(part.limit_seconds, left)
        print(f"\n[{number}/{len(plan.parts)}] {part.name}: at most {limit:.0f} s, {left:.0f} s left", flush=True)
        results.append(run_part(plan, part, limit))
        result = results[-1]
        print(
            f"[{number}/{len(plan.parts)}] {part.name}: {result.status} {result.why} ({result.seconds:.1f} s)",
            flush=True,
        )
    return results


def run_part(plan: Plan, part: Part, limit: float) -> Result:
    """One part within `limit` seconds."""
    if plan.is_dry and not part.runs_dry:
        return Result(part.name, Status.SKIPPED, why="a dry run leaves it out")
    if missing := part.missing():
        return Result(part.name, Status.SKIPPED, why=missing)
    if limit < LEAST_SECONDS:
        return Result(part.name, Status.NOT_REACHED, why="the time was used up")
    with plan.log.open("a") as file:
        file.write(f"== {part.name}\n")
    # The interpreter would run kernels on a card's machine, too, and its tests ask for it.
    environment = {"TRITON_INTERPRET": "1" if plan.is_dry else "0", "PYTHONUNBUFFERED": "1"}
    ended = run(command_of(plan, part, limit), limit, plan.log, folder=ROOT, environment=environment)
    seconds = round(ended.seconds, 1)
    if ended.exit_code is None:
        return Result(part.name, Status.OVER_TIME, seconds, f"not done after {limit:.0f} s")
    if ended.exit_code:
        return Result(part.name, Status.FAILED, seconds, f"exit code {ended.exit_code}: {ended.last_line}")
    return Result(part.name, Status.OK, seconds)


def command_of(plan: Plan, part: Part, limit: float) -> list[str]:
    """The part's command line."""
    command = [sys.executable, "-m", part.module, *part.arguments]
    if not part.takes_options:
        return command
    command += ["--records", str(plan.records), "--part", part.name, "--models", str(plan.models)]
    command += ["--until", f"{time.monotonic() + limit:.1f}"]
    return [*command, "--dry"] if plan.is_dry else command


if __name__ == "__main__":
    sys.exit(main())

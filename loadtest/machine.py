"""What ran where: the machine's description, the commit, and how much of the machine others took meanwhile."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "loadtest" / "out"
TOLERATED_SHARE = 0.1
"""A run during which other processes took more of the machine than this is marked as noisy."""


def describe() -> dict[str, str | int]:
    """Hardware and versions, for the record."""
    return {
        "cpu": _cpu_name(),
        "cpus": len(psutil.Process().cpu_affinity()),
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """The short commit, with a plus where the tree differs from it; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds so far: of the whole machine, and of this process and its children, ended ones included."""

    capacity: float
    busy: float
    ours: float


def cpu_times() -> CpuTimes:
    """Reads the counters."""
    times = psutil.cpu_times()
    everything = sum(times[:8])  # guest times are part of user and nice
    ours = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            ours += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return CpuTimes(everything, everything - times.idle - times.iowait, ours)


def others_share(before: CpuTimes, after: CpuTimes) -> float:
    """The share of the machine that other processes took in between. Both readings must see the same children."""
    capacity = after.capacity - before.capacity
    theirs = (after.busy - before.busy) - (after.ours - before.ours)
    return max(0.0, theirs / capacity) if capacity else 0.0


def noise(share: float) -> str | None:
    """A warning about a run during which others took so much, or None where it is little enough."""
    if share <= TOLERATED_SHARE:
        return None
    return f"noisy: other processes took {share:.0%} of the machine; repeat on a quiet one"

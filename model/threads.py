"""How many CPUs this process may use, and which of them compute. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from model.interface import MAX_THREADS

CGROUP_ROOT = Path("/sys/fs/cgroup")
SELF_CGROUP = Path("/proc/self/cgroup")


ENOUGH_CPUS = 4
"""From so many on one is left to the front end; fewer are shared, and whoever waits sleeps."""


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """How many threads compute, the engine's own included, and where the others stay; empty: wherever there is room."""

    num_threads: int
    cpus: tuple[int, ...] = ()
    """By thread; the first is the engine's own, which is left to the system: others inherit where it may run."""


def plan_threads(num_threads: int | None, pins: bool | None) -> ThreadPlan:
    """What was asked for; None leaves it to this machine.

    Raises ValueError for more threads than MAX_THREADS, and where threads are to be tied to CPUs and cannot be.

    By itself a thread is tied to a CPU only where this process has all of them but one to itself: with fewer threads a
    second server would tie its own to the same CPUs, and where a quota counts time and not CPUs, the system does better
    by moving threads away from whatever else runs.
    """
    if num_threads is not None and num_threads > MAX_THREADS:
        raise ValueError(f"threads: {MAX_THREADS} compute together at most, not {num_threads}")
    if pins and not _can_tie():
        raise ValueError("pin_threads: this system does not tie threads to CPUs")
    cpus, quota = _allowed_cpus(), _quota(CGROUP_ROOT, SELF_CGROUP)
    available = available_cpus()
    wanted = num_threads or min(available if available < ENOUGH_CPUS else available - 1, MAX_THREADS)
    if pins is None:
        pins = num_threads is None and quota is None and len(cpus) >= ENOUGH_CPUS and _can_tie()
    return ThreadPlan(wanted, tuple(cpus[i % len(cpus)] for i in range(wanted)) if pins else ())


def available_cpus(cgroup_root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP) -> int:
    """The process's CPU affinity, cut to the control group's quota (whole CPUs, at least one)."""
    cpus, quota = len(_allowed_cpus()), _quota(cgroup_root, self_cgroup)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def _can_tie() -> bool:
    """Whether the system lets this process say where it runs: asked by saying what holds already.

    What is said stays: CPUs that its group is given later are not used. Where threads are tied they are not anyway.
    """
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return False
    return True


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quota(cgroup_root: Path, self_cgroup: Path) -> float | None:
    """CPUs that the tightest group around this process allows, or None where nothing limits it."""
    quotas = []
    for line in _read(self_cgroup).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = cgroup_root / "cpu" if controllers else cgroup_root
        group = base / path.lstrip("/")
        # In a container the path may name a place outside of it; the mounted root then is the container's own group.
        while group != base.parent:
            quotas.append(_group_quota(group))
            group = group.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _group_quota(group: Path) -> float | None:
    """Version 2 keeps "quota period" in cpu.max, version 1 in two files of microseconds."""
    quota, _, period = _read(group / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()
    if not quota.isdecimal() or not period.isdecimal() or not int(period):
        return None
    return int(quota) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

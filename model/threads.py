"""How many CPUs this process may use. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
SELF_CGROUP = Path("/proc/self/cgroup")


def available_cpus(cgroup_root: Path = CGROUP_ROOT, self_cgroup: Path = SELF_CGROUP) -> int:
    """The process's CPU affinity, cut to the control group's quota (whole CPUs, at least one)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup_root, self_cgroup)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


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

"""How many cores this process may really use: the smallest of affinity and cgroup CPU quotas (v1 and v2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MAX_DEFAULT_SHARDS = 4


def default_shards() -> int:
    return min(MAX_DEFAULT_SHARDS, usable_cores())


def usable_cores(
    *, affinity: int | None = None, cgroup_file: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int:
    """At least 1. A quota of 2.5 cores counts as 2: a shard that is throttled in every period is worse than none."""
    cores = float(len(os.sched_getaffinity(0)) if affinity is None else affinity)
    for group in _groups(cgroup_file, mount):
        cores = min(cores, _quota_v2(group), _quota_v1(group))
    return max(1, int(cores))


def _groups(cgroup_file: Path, mount: Path) -> Iterator[Path]:
    """Directories whose limits hold for this process: its own group in every hierarchy, and all above."""
    try:
        lines = cgroup_file.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if not controllers:  # v2, alone or beside v1
            roots = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [mount / controllers, mount / "cpu"]
        else:
            continue
        for root in roots:
            # In a container the path may be the host's, of which nothing but the root is mounted here.
            group = root / path.lstrip("/")
            yield from (group, *(parent for parent in group.parents if parent.is_relative_to(root)))


def _quota_v2(group: Path) -> float:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float:
    """Infinite where there is no quota: `max` in v2, -1 in v1."""
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        return int(quota) / int(period)
    return float("inf")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

"""How many cores there are for this process, in a container too."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Those that this process is bound to, or fewer where a container's quota allows less.

    Args:
        cgroup: where the control groups of version 2 or 1 are mounted.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, _quota(cgroup) or bound)


def _quota(cgroup: Path) -> int | None:
    """A container's quota of processor time in cores, rounded up; None where it has none."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # another version, or no quota: "max"
            quota_us, period_us = map(int, " ".join((cgroup / file).read_text() for file in files).split())
            if quota_us > 0:
                return math.ceil(quota_us / period_us)
    return None

"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

NAMES = {  # of a control group's limit, what it uses, and the part of that which the kernel gives back when asked
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("memory.max", "memory.current", "inactive_file"),
}


def available_memory(own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that are free on this machine, or fewer where a control group that this process is in, as that of a SLURM
    job or a container, allows fewer.

    Source: Linux, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.

    Args:
        own: the groups of the process, lines `ID:CONTROLLERS:PATH`; version 2 has no controllers there.
        mount: where the groups are.
    """
    free = psutil.virtual_memory().available
    lines = own.read_text().splitlines() if own.is_file() else []
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers in NAMES:
            root = mount / controllers
            group = root / path.lstrip("/")
            while group.is_relative_to(root):  # a group has at most what those above it have
                free = min(free, _left(group, *NAMES[controllers]))
                group = group.parent
    return free


def _left(group: Path, limit: str, used: str, reclaimable: str) -> float:
    """Bytes; infinite where there is no limit, or no such group: a container sees its own at the root."""
    try:
        most, now = (group / limit).read_text().strip(), int((group / used).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else max(int(most) - now + int(counts.get(reclaimable, 0)), 0)

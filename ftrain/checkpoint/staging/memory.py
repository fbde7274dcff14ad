"""How much memory this process may still take, from the host and from the control groups above it."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """The least that the kernel and any memory control group (v2) still grant without reclaiming what is in use."""
    return min([_meminfo(), *_groups()])


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def _groups() -> list[int]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    group = _CGROUPS / own
    return [left for level in (group, *group.parents) if level.is_relative_to(_CGROUPS) for left in _left_in(level)]


def _left_in(group: Path) -> list[int]:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cache = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, ValueError, StopIteration):
        return []
    return [] if limit == "max" else [max(0, int(limit) - used + cache)]

"""What the processes of a run hold in the course of it, and whether that grows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, median_low

from tests.chaos.run import Chaos

WARM_FAULTS = 50  # in the life of a process, or a third of what it is looked at: by then every code path was taken once
SAMPLES_MIN = 8  # since then, of one process: fewer say nothing
# Of resident memory, a fault. Allocators take 128 KiB and more at a time, so that less is not to be told from nothing
# in a few hundred faults; an arena, a thread, a group's buffers are more.
GROWTH_KIB_MAX = 4.0
# torch keeps the newest 2000 collectives of a process, each with the Python frames it was called from: memory that
# grows with the steps until then. With fewer that is over before anything is judged.
RECORDER = "TORCH_FR_BUFFER_SIZE"
RECORDS = 100
ROWS = 12  # of a table
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    faults: int  # so far
    pid: int
    descriptors: int
    threads: int
    shared: int  # mappings of shared memory
    resident_mib: float


@dataclass
class Leaks:
    """What processes held in the course of a chaos, and how many segments the machine had in /dev/shm."""

    samples: dict[str, list[Held]] = field(default_factory=dict)
    segments: list[int] = field(default_factory=list)

    def look(self, chaos: Chaos, faults: int) -> None:
        self.segments.append(len(os.listdir(SHM)))
        for name, pid in chaos.pids().items():
            if pid and (found := _held(pid, faults)) is not None:
                known = self.samples.setdefault(name, [])
                if known and known[-1].pid != pid:  # another process in its place
                    self.samples[f"{name} until {known[-1].faults} faults"] = known
                    known = self.samples[name] = []
                known.append(found)

    def found(self) -> list[str]:
        """What grew, one line each."""
        lines = []
        for name, samples in self.samples.items():
            warm = _warm(samples)
            if len(warm) < SAMPLES_MIN:
                continue
            # A recovery may be under way at any look: what is held for good is what most looks find.
            early, late = warm[: len(warm) // 2], warm[len(warm) // 2 :]
            for what in ("descriptors", "threads", "shared"):
                before, after = (median_low(getattr(one, what) for one in half) for half in (early, late))
                if after > before:
                    lines.append(f"{name}: {before} {what}, then {after}")
            grown = steady_growth_kib(warm)
            if grown > GROWTH_KIB_MAX:
                lines.append(f"{name}: {grown:.1f} KiB more of resident memory with each fault")
        if len(self.segments) >= SAMPLES_MIN:
            half = len(self.segments) // 2
            before, after = median_low(self.segments[:half]), median_low(self.segments[half:])
            if after > before:
                lines.append(f"{SHM}: {before} segments, then {after}")
        return lines

    def table(self) -> list[str]:
        """A few of the looks at each process, evenly spread, the first and the last among them; then the growth."""
        lines = []
        for name, samples in self.samples.items():
            lines.append(f"{name} (pid {samples[-1].pid}): faults, descriptors, threads, shared mappings, resident MiB")
            rows = min(ROWS, len(samples))
            for row in range(rows):
                one = samples[row * (len(samples) - 1) // max(rows - 1, 1)]
                lines.append(
                    f"  {one.faults:6} {one.descriptors:6} {one.threads:6} {one.shared:6} {one.resident_mib:10.2f}"
                )
            warm = _warm(samples)
            if len(warm) >= SAMPLES_MIN:
                grown = (warm[-1].resident_mib - warm[0].resident_mib) * 1024 / (warm[-1].faults - warm[0].faults)
                steady = steady_growth_kib(warm)
                lines.append(f"  since {warm[0].faults} faults: {grown:+.2f} KiB a fault, steadily {steady:+.2f}")
        if self.segments:
            lines.append(f"{SHM}: {self.segments[0]} segments at first, {self.segments[-1]} at last")
        return lines


def steady_growth_kib(samples: list[Held]) -> float:
    """Of resident memory, a fault: what a third of the time has brought more than the one before it.

    The less of two such growths: memory is taken in leaps, and one leap is in one of them alone.
    """
    third = len(samples) // 3
    parts = [samples[:third], samples[third : 2 * third], samples[2 * third :]]
    places = [(median(one.faults for one in part), median(one.resident_mib for one in part)) for part in parts]
    return min((after[1] - before[1]) * 1024 / (after[0] - before[0]) for before, after in pairwise(places))


def _warm(samples: list[Held]) -> list[Held]:
    first, last = samples[0].faults, samples[-1].faults
    return [one for one in samples if one.faults >= first + max(WARM_FAULTS, (last - first) // 3)]


def _held(pid: int, faults: int) -> Held | None:
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        shared = sum(" /memfd:" in line or " /dev/shm/" in line for line in maps)
        resident = int(status["VmRSS"].split()[0]) / 1024
        return Held(faults, pid, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), shared, round(resident, 2))
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None

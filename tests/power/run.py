"""A real run on a recorded disk: launcher, agent, coordinator and ranks, with commits and retirements."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.crash.judge import Expected
from tests.power import train
from tests.power.file_system import FileSystem, mounted
from tests.power.files import copy_sparse
from tests.power.recorder import Entry, Kind, read_log, recording
from tests.power.told import ACKED, RETIRING, read_marks

ROOT = Path(__file__).parents[2]
RANKS = 2
KEEP = 2
TIMEOUT_SECONDS = 900


class RunFailed(Exception):
    """The run did not do what was asked of it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a run did to its disk. `image` is the disk before the first entry."""

    kind: FileSystem
    image: Path
    entries: list[Entry]
    digests: dict[int, str]  # of the state after so many steps
    before: Expected = Expected()  # what had been said when it began

    def count(self, kind: Kind) -> int:
        return sum(entry.kind is kind for entry in self.entries)

    def told(self, what: str) -> int:
        return sum(mark.what == what for mark in read_marks([e.data for e in self.entries if e.kind is Kind.MARK]))

    def text(self) -> str:
        nbytes = sum(len(entry.data) for entry in self.entries if entry.kind is Kind.WRITE)
        return (
            f"{self.kind.name}: {self.told(ACKED)} commits, {self.told(RETIRING)} retired; {self.count(Kind.WRITE)} "
            f"writes ({nbytes / 1e6:.1f} MB), {self.count(Kind.FLUSH)} flush points"
        )


def record(kind: FileSystem, place: Path, commits: int, bug: str = "", pause_seconds: float = 0.1) -> Recording:
    """Train on a new disk below the folder `place` until so many commits are made. Raises `RunFailed`."""
    kind.format(place / "image")
    found = record_run(kind, place, commits * train.STEPS_PER_COMMIT, bug, pause_seconds)
    if found.told(ACKED) < commits:
        raise RunFailed(f"only {found.told(ACKED)} of {commits} commits were made in time: give it a longer --pause")
    return found


def record_run(kind: FileSystem, place: Path, steps: int, bug: str = "", pause_seconds: float = 0.1) -> Recording:
    """Train up to so many steps on the disk `place`/image, whatever is on it. Raises `RunFailed`."""
    image, begin, log, digests = (place / name for name in ("image", "begin", "log", "digests"))
    copy_sparse(image, begin)
    with (
        recording(image, log, place / "fuse") as recorder,
        mounted(kind, recorder.disk, place / "disk") as disk,
    ):
        _launch(disk / "run", recorder.marks, bug, steps, digests, pause_seconds, place / "output.txt")
    return Recording(kind, begin, read_log(log), _read_digests(digests))


def _launch(
    run_dir: Path, marks: Path, bug: str, steps: int, digests: Path, pause_seconds: float, output: Path
) -> None:
    """`ftrain launch` to its end. Raises `RunFailed` with its output."""
    command = [
        *(sys.executable, "-m", "tests.power.told", marks, bug, "launch", "--nproc-per-node", RANKS),
        *("--run-dir", run_dir, "--checkpoint-every", train.STEPS_PER_COMMIT, "--snapshot-every", "off"),
        *("--keep", KEEP, train.__file__, "--steps", steps, "--digests", digests, "--pause", pause_seconds),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        with output.open("wb") as file:
            subprocess.run(
                list(map(str, command)),
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                timeout=TIMEOUT_SECONDS,
            )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise RunFailed(f"{error}\n{output.read_text(errors='replace')[-3000:]}") from None


def _read_digests(path: Path) -> dict[int, str]:
    """Raises `RunFailed` where a step that was done twice came out differently."""
    found: dict[int, str] = {}
    for line in path.read_text().splitlines():
        step, value = line.split()
        if found.setdefault(int(step), value) != value:
            raise RunFailed(f"step {step} came out differently when it was done again")
    return found

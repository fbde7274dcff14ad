"""Flips each bit of a small run's directory, and cuts each of its files short: all of it must be noticed, or harmless.

python -m tests.attacks.flips                    every bit, every length, of each layout (an hour of one processor)
python -m tests.attacks.flips --layout disks     of one: plain, compressed (format 2) or disks (packs on two disks)
python -m tests.attacks.flips --every 97         a sample

`load` may not read everything: what it then gives must be right all the same. `verify` must find every change of the
checkpoint, and a run's journal may lose its newest record to damage only with an error. What says where a run's other
disk is may be changed without harm: then all is found, and whole, or refused.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import ftrain
from ftrain.checkpoint.catalogue import Commit
from ftrain.checkpoint.tools.verify import verify
from ftrain.core.journal import CommitBody, RunBody
from ftrain.errors import FtrainError
from ftrain.storage import open_storage
from ftrain.storage.history import read_history
from ftrain.storage.spread import SpreadStorage
from tests.attacks import hostile
from tests.checkpoint.world import line, save, sharded


@dataclass(frozen=True, slots=True)
class Run:
    """A run with one commit, and what it holds."""

    path: Path
    value: dict[str, object]
    disk: Path | None = None  # where the pack of rank 1 is

    @property
    def commit(self) -> Commit:
        """As somebody finds it who begins anew."""
        storage = open_storage(str(self.path))
        history, _ = read_history(storage)
        (_, body), *_ = history.commits
        return Commit(storage, body.attempt.path, body.attempt, 1, 1, body.manifest_sha256)

    def empty(self) -> dict[str, object]:
        kinds = {int: 0, str: ""}
        return {
            key: torch.zeros_like(there) if isinstance(there, torch.Tensor) else kinds[type(there)]
            for key, there in self.value.items()
        }


def plain(path: Path) -> Run:
    value = {"w": torch.arange(100.0), "step": 7, "name": "x"}
    ftrain.save(path / "checkpoint", value)
    return Run(hostile.as_run(path / "checkpoint", path / "run"), value)


def compressed(path: Path) -> Run:
    value = {"w": torch.arange(2000.0), "step": 7, "name": "x"}
    ftrain.save(path / "checkpoint", value, compress="blosc-zstd")
    return Run(hostile.as_run(path / "checkpoint", path / "run"), value)


def disks(path: Path) -> Run:
    """Two ranks, each with a half of the tensor: one's pack is in the run's directory, the other's on the disk."""
    value = {"w": torch.arange(100.0)}
    storage = SpreadStorage(path / "run", [str(path / "disk")])
    storage.check()
    sha256 = save(storage, hostile.ATTEMPT, 2, lambda rank: [sharded("w", value["w"], line(2), ("S0",), rank)])
    hostile.write_journal(path / "run", [RunBody("run", "job", "1"), CommitBody(hostile.ATTEMPT, 2, sha256, 1)])
    return Run(path / "run", dict(value), path / "disk")


LAYOUTS: dict[str, Callable[[Path], Run]] = {"plain": plain, "compressed": compressed, "disks": disks}


def damages(data: bytes, every: int) -> Iterator[tuple[str, bytes]]:
    for bit in range(0, 8 * len(data), every):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit % 8} of byte {bit // 8} flipped", bytes(changed)
    for length in range(0, len(data), every):
        yield f"cut to {length} bytes", data[:length]


def flip_all(run: Run, every: int, tell: Callable[[str], None] = lambda _: None) -> tuple[Counter[str], list[str]]:
    """How many changes were refused by `load`, and harmless to it; what slipped through. `tell` hears of each file."""
    counts: Counter[str] = Counter()
    slipped: list[str] = []
    commit = run.commit
    for path in files_of(run):
        before = counts.copy()
        good = path.read_bytes()
        name = str(path.relative_to(run.path.parent))
        for what, data in damages(good, every):
            path.write_bytes(data)
            counts["flipped bits" if len(data) == len(good) else "cuts"] += 1
            problem = check(run, commit, path, counts)
            if problem:
                slipped.append(f"{name}: {what}: {problem}")
        path.write_bytes(good)
        tell(f"  {name}: {said(counts - before)}")
    return counts, slipped


def said(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def files_of(run: Run) -> list[Path]:
    """All of the run's, those on its disk by the links to them, and the disk's own."""
    inside = sorted(path for path in run.path.rglob("*") if path.is_file())
    packs = [path.resolve() for path in inside]
    more = sorted(path for path in run.disk.rglob("*") if path.is_file()) if run.disk else []
    return [*inside, *(path for path in more if path not in packs)]


def check(run: Run, commit: Commit, path: Path, counts: Counter[str]) -> str:
    """What is wrong with how damage of this file is met; empty where nothing is."""
    kind = path.relative_to(run.path).parts[0] if path.is_relative_to(run.path) else "disks"
    state = run.empty()
    try:
        ftrain.load(run.path, state)
    except FtrainError:
        counts["refused by load"] += 1
    else:
        counts["harmless to load"] += 1
        for key, there in run.value.items():
            found = state[key]
            same = torch.equal(there, found) if isinstance(there, torch.Tensor) else there == found  # type: ignore[arg-type]
            if not same:
                return f"{key} was loaded wrongly"
        if kind == "journal":
            return "the journal was changed, and nobody noticed"
    if kind == "journal":
        return ""
    try:
        verify(Commit(open_storage(str(run.path)), commit.path, commit.attempt, 1, 1, commit.manifest_sha256))
    except FtrainError:
        counts["found by verify"] += 1
    else:
        counts["harmless to verify"] += 1
        if kind == "checkpoints":
            return "verify found nothing"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.flips", description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--layout", choices=LAYOUTS)
    arguments = parser.parse_args()
    slips = 0
    os.path.realpath = functools.cache(os.path.realpath)  # contents change here, never links: a third of the time
    for layout in [arguments.layout] if arguments.layout else LAYOUTS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ftrain-flips-") as directory:
            counts, slipped = flip_all(
                LAYOUTS[layout](Path(directory)), arguments.every, functools.partial(print, flush=True)
            )
        print("\n".join([f"{layout}: {said(counts)}", *slipped[:20]]))
        print(f"{len(slipped)} slipped through, {time.monotonic() - began:.0f} s", flush=True)
        slips += len(slipped)
    sys.exit(1 if slips else 0)


if __name__ == "__main__":
    main()

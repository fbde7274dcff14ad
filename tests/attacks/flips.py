"""Flips each bit of a small run's directory, and cuts each of its files short: all of it must be noticed, or harmless.

python -m tests.attacks.flips                  every bit, every length (minutes)
python -m tests.attacks.flips --every 97       a sample

`load` may not read everything: what it then gives must be right all the same. `verify` must find every change of the
checkpoint, and a run's journal may lose its newest record to damage only with an error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import ftrain
from ftrain.checkpoint.catalogue import Commit
from ftrain.checkpoint.tools.verify import verify
from ftrain.errors import FtrainError
from ftrain.storage import PosixStorage
from ftrain.storage.history import read_history
from tests.attacks import hostile


def value() -> dict[str, object]:
    return {"w": torch.arange(100.0), "b": torch.arange(3), "step": 7, "name": "x"}


def empty() -> dict[str, object]:
    return {"w": torch.zeros(100), "b": torch.zeros(3, dtype=torch.int64), "step": 0, "name": ""}


def make_run(path: Path, compress: str | None = None) -> Path:
    checkpoint = path / "checkpoint"
    ftrain.save(checkpoint, value(), compress=compress)
    return hostile.as_run(checkpoint, path / "run")


def damages(data: bytes, every: int) -> Iterator[tuple[str, bytes]]:
    for bit in range(0, 8 * len(data), every):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit % 8} of byte {bit // 8} flipped", bytes(changed)
    for length in range(0, len(data), every):
        yield f"cut to {length} bytes", data[:length]


def flip_all(run: Path, every: int) -> tuple[Counter[str], list[str]]:
    """How many changes were refused by `load`, and harmless to it; and what slipped through."""
    counts: Counter[str] = Counter()
    slipped: list[str] = []
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        good = path.read_bytes()
        name = str(path.relative_to(run))
        for what, data in damages(good, every):
            path.write_bytes(data)
            problem = check(run, is_of_checkpoint=name.startswith("checkpoints"), counts=counts)
            if problem:
                slipped.append(f"{name}: {what}: {problem}")
        path.write_bytes(good)
    return counts, slipped


def check(run: Path, is_of_checkpoint: bool, counts: Counter[str]) -> str:
    """What is wrong with how this damage is met; empty where nothing is."""
    state = empty()
    try:
        ftrain.load(run, state)
    except FtrainError:
        counts["refused by load"] += 1
    else:
        counts["harmless to load"] += 1
        expected = value()
        for key, there in expected.items():
            found = state[key]
            same = torch.equal(there, found) if isinstance(there, torch.Tensor) else there == found  # type: ignore[arg-type]
            if not same:
                return f"{key} was loaded wrongly"
        if not is_of_checkpoint:
            return "the journal was changed, and nobody noticed"
    if is_of_checkpoint:
        try:
            verify(commit_of(run))
        except FtrainError:
            counts["found by verify"] += 1
        else:
            return "verify found nothing"
    return ""


def commit_of(run: Path) -> Commit:
    storage = PosixStorage(run)
    history, _ = read_history(storage)
    (_, body), *_ = history.commits
    return Commit(storage, body.attempt.path, body.attempt, 1, 1, body.manifest_sha256)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.flips", description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ftrain-flips-") as directory:
        counts, slipped = flip_all(make_run(Path(directory)), arguments.every)
    print("\n".join([f"{sum(counts.values())} answers: {dict(counts)}", *slipped[:20]]))
    print(f"{len(slipped)} slipped through, {time.monotonic() - began:.0f} s")
    sys.exit(1 if slipped else 0)


if __name__ == "__main__":
    main()

"""Removal of what no commit refers to: aborted attempts, retired checkpoints, leftovers of crashed writers."""

from __future__ import annotations

import re
from collections.abc import Collection

from ftrain.storage.base import Storage

CHECKPOINTS = "checkpoints"


def remove(storage: Storage, path: str) -> None:
    """Remove the attempt at `path`. The journal must have let go of it before. No error where it is gone already."""
    storage.remove_tree(path)


def sweep(storage: Storage, live_paths: Collection[str], before_generation: int) -> list[str]:
    """Remove the attempts of generations before this one that are not live, and return their paths.

    A generation is recorded in the journal only when the attempts of the one before are settled. So with the number
    of the newest generation in the journal this is safe even while an older coordinator still lives: what it may yet
    commit belongs to that generation or a later one.
    """
    removed = []
    for step in storage.list(CHECKPOINTS):
        for name in storage.list(f"{CHECKPOINTS}/{step}"):
            path = f"{CHECKPOINTS}/{step}/{name}"
            if path not in live_paths and _generation(name) < before_generation:
                storage.remove_tree(path)
                removed.append(path)
    return removed


def _generation(name: str) -> float:
    """Of an attempt's directory, `g0003-a1`; what is named otherwise is not ours to remove."""
    found = re.fullmatch(r"g(\d+)-a\d+", name)
    return int(found[1]) if found else float("inf")

"""Removal of what no commit refers to: aborted attempts, retired checkpoints, leftovers of crashed writers."""

from __future__ import annotations

from collections.abc import Collection

from ftrain.storage.base import Storage

CHECKPOINTS = "checkpoints"


def remove(storage: Storage, path: str) -> None:
    """Remove the attempt at `path`. The journal must have let go of it before. No error where it is gone already."""
    storage.remove_tree(path)


def sweep(storage: Storage, live_paths: Collection[str], in_flight: Collection[str] = ()) -> list[str]:
    """Remove every attempt that is neither live nor in flight, and return their paths.

    For a coordinator that owns the journal and has not proposed anything beyond `in_flight`: then what is not committed
    never will be.
    """
    keep = {*live_paths, *in_flight}
    removed = []
    for step in storage.list(CHECKPOINTS):
        for name in storage.list(f"{CHECKPOINTS}/{step}"):
            path = f"{CHECKPOINTS}/{step}/{name}"
            if path not in keep:
                storage.remove_tree(path)
                removed.append(path)
    return removed

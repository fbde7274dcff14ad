"""Removal of what no commit refers to: aborted attempts, retired checkpoints, leftovers of crashed writers."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection

from ftrain.checkpoint.pins import pins
from ftrain.checkpoint.written import referred
from ftrain.core.manifest import MANIFEST_PATH, decode_manifest
from ftrain.errors import CorruptCheckpoint, NotFound
from ftrain.storage.base import Storage

log = logging.getLogger("ftrain")
CHECKPOINTS = "checkpoints"


def remove(storage: Storage, path: str, pinned: Collection[str] | None = None) -> None:
    """Remove the attempt at `path`, unless a pin keeps it. The journal must have let go of it before.

    `pinned` is what `pinned_paths` has given since then, where several are removed. No error where it is gone already.
    Raises `CorruptCheckpoint`, with nothing removed, where a pin or a pinned commit cannot be read: it may need it.
    """
    if path not in (pinned_paths(storage) if pinned is None else pinned):
        storage.remove_tree(path)


def pinned_paths(storage: Storage) -> set[str]:
    """The attempts that pinned commits need: themselves, and those to whose packs they refer."""
    found: set[str] = set()
    for path in pins(storage).values():
        found.add(path)
        where = f"{path}/{MANIFEST_PATH}"
        try:
            manifest = decode_manifest(storage.read(where), f"{storage.url}/{where}")
        except NotFound:
            continue  # it was pinned when it was gone already
        found.update(attempt.path for attempt in referred(manifest.packs))
    return found


def sweep(storage: Storage, live_paths: Collection[str], before_generation: int) -> list[str]:
    """Remove the attempts of generations before this one that are neither live nor pinned, and return their paths.

    `live_paths` are all that the journal's commits need. To be called by the coordinator that has fenced all others:
    one that still could append would commit what looks unfinished here. Attempts of the newest generation in its
    journal, and of later ones, are its own to settle. Nothing is removed where it cannot be read what pinned commits
    need.
    """
    removed: list[str] = []
    try:
        kept = {*live_paths, *pinned_paths(storage)}
    except CorruptCheckpoint as error:
        log.warning("nothing is removed of what former attempts left: %s", error)
        return removed
    for step in storage.list(CHECKPOINTS):
        for name in storage.list(f"{CHECKPOINTS}/{step}"):
            path = f"{CHECKPOINTS}/{step}/{name}"
            if path not in kept and _generation(name) < before_generation:
                storage.remove_tree(path)
                removed.append(path)
    return removed


def _generation(name: str) -> float:
    """Of an attempt's directory, `g0003-a1`; what is named otherwise is not ours to remove."""
    found = re.fullmatch(r"g(\d+)-a\d+", name)
    return int(found[1]) if found else float("inf")

"""What is in a checkpoint, by the names under which it was tracked or saved."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.core.layout import ITEM_BYTES

_OPTIONS_SHOWN = ("lr", "weight_decay", "betas", "momentum")


@dataclass(frozen=True, slots=True)
class Described:
    """One object of a checkpoint."""

    name: str
    kind: str  # module, optimizer, dict, object
    tensors: int
    elements: int
    nbytes: int
    dtypes: tuple[str, ...]
    note: str = ""  # of an optimizer, its options


def describe(checkpoint: Checkpoint) -> list[Described]:
    """The objects, as rank 0 had them; tensors that were each rank's own count for each."""
    tracked: dict[str, Any] = tracked_of(checkpoint)
    by_name: dict[str, list[TensorInfo]] = {name: [] for name in tracked}
    own = [checkpoint.private_tensors(rank) for rank in range(checkpoint.world_size)]
    for tensors in (checkpoint.tensors, *own):
        for key, info in tensors.items():
            by_name.setdefault(owner(key, tracked), []).append(info)
    return [_described(name, infos, tracked.get(name)) for name, infos in by_name.items()]


def tracked_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plain data of what rank 0 tracked, by name."""
    found = checkpoint.plain(0).get("tracked")
    return dict(found) if isinstance(found, dict) else {}


def names_of(kind: str, checkpoint: Checkpoint) -> list[str]:
    """Of the tracked objects that are of this kind: "module", "optimizer", …"""
    return [name for name, plain in tracked_of(checkpoint).items() if kind_of(plain) == kind]


def owner(key: str, names: Collection[str]) -> str:
    """The name that a key belongs to; "" for what has none."""
    first = key.partition(".")[0]
    return first if first in names else ""


def kind_of(plain: object) -> str:
    if not isinstance(plain, dict):
        return "tensors"
    for mark, kind in (("extra", "module"), ("groups", "optimizer"), ("state", "object"), ("values", "dict")):
        if mark in plain:
            return kind
    return "object"


def _described(name: str, infos: list[TensorInfo], plain: object) -> Described:
    sizes = [(prod(info.shape), ITEM_BYTES[info.dtype]) for info in infos]
    return Described(
        name,
        kind_of(plain),
        len(infos),
        sum(count for count, _ in sizes),
        sum(count * item for count, item in sizes),
        tuple(sorted({info.dtype for info in infos})),
        _options(plain),
    )


def _options(plain: object) -> str:
    groups = plain.get("groups") if isinstance(plain, dict) else None
    if not isinstance(groups, list) or not groups or not isinstance(groups[0], dict):
        return ""
    options = groups[0].get("options")
    if not isinstance(options, dict):
        return ""
    more = f", {len(groups)} groups" if len(groups) > 1 else ""
    return ", ".join(f"{name} {options[name]}" for name in _OPTIONS_SHOWN if name in options) + more

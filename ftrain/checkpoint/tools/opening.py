"""From what a user names to tensors: a commit, a saved checkpoint, or a file of another format."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ftrain.checkpoint.catalogue import Commit, find
from ftrain.checkpoint.foreign.opening import open_foreign
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.state.items import TensorItem, item_of, torch_dtype
from ftrain.checkpoint.state.source import TensorInfo, TensorSource, Wanted
from ftrain.errors import MismatchedState

Natural = tuple[tuple[bool, int, str], ...]


def open_commit(commit: Commit) -> Checkpoint:
    """Raises `CorruptCheckpoint`."""
    return Checkpoint.open(commit.storage, commit.path, commit.manifest_sha256)


def open_reference(reference: str) -> TensorSource:
    """What `find` takes, or a path to safetensors, a torch file or DCP. All tensors, those of ranks, too."""
    foreign = open_foreign(reference) if Path(reference).exists() else None
    return foreign if foreign is not None else Everything(open_commit(find(reference)))


def matching(keys: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """The keys that match one of the patterns, or all; sorted as people count. Raises `MismatchedState` for none."""
    every = list(keys)
    found = [key for key in every if not patterns or any(fnmatch.fnmatchcase(key, one) for one in patterns)]
    if patterns and not found:
        some = ", ".join(sorted(every)[:5])
        raise MismatchedState(f"no tensor matches {' or '.join(patterns)}; there are {len(every)}: {some}, …")
    return sorted(found, key=natural)


def natural(key: str) -> Natural:
    """So that layers.10 comes after layers.9."""
    return tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in key.split("."))


class Everything:
    """A checkpoint with what was each rank's alone, under `rank-00003/<key>`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._own = {
            f"rank-{rank:05d}/{key}": (rank, key)
            for rank in range(checkpoint.world_size)
            for key in checkpoint.private_tensors(rank)
        }
        own = {name: checkpoint.private_tensors(rank)[key] for name, (rank, key) in self._own.items()}
        self._tensors = {**checkpoint.tensors, **own}

    @property
    def url(self) -> str:
        return self.checkpoint.url

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def names(self) -> Collection[str] | None:
        return self.checkpoint.names

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, wanted: Sequence[Wanted]) -> None:
        self.checkpoint.read([one for one in wanted if one.key not in self._own])
        for one in wanted:
            if one.key in self._own:
                rank, key = self._own[one.key]
                one.into.copy_(self._private(rank, key)[tuple(map(_slice, one.box.offset, one.box.shape))])

    def _private(self, rank: int, key: str) -> torch.Tensor:
        info = self.checkpoint.private_tensors(rank)[key]
        item: TensorItem = item_of(key, torch.empty(info.shape, dtype=torch_dtype(info.dtype)), private=True)
        self.checkpoint.read_into([item], rank, elsewhere=self.checkpoint.tensors.keys())
        return item.local


def _slice(begin: int, count: int) -> slice:
    return slice(begin, begin + count)

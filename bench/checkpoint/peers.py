"""torch.save and safetensors: one file per rank, made durable by us."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from states import State
from subjects import Pending


class PerRank:
    """What subjects have in common that write one file or folder per rank and know nothing of other ranks."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def file(self, path: Path, suffix: str = "") -> Path:
        path.mkdir(parents=True, exist_ok=True)
        return path / f"rank{self.rank}{suffix}"

    def begin(self, path: Path, state: State) -> Pending:
        raise NotImplementedError(f"{type(self).__name__} cannot save {len(state)} tensors to {path} asynchronously")

    def close(self) -> None:
        """Nothing is kept."""


class TorchSave(PerRank):
    def __init__(self, rank: int, ranks: int, *, mmap: bool = False) -> None:
        super().__init__(rank)
        del ranks  # it does not have to know
        self.mmap = mmap
        torch.serialization.set_crc32_options(False)

    def save(self, path: Path, state: State) -> None:
        file = self.file(path, ".pt")
        with file.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        sync(path)

    def load(self, path: Path, state: State) -> None:
        copy_into(state, torch.load(self.file(path, ".pt"), mmap=self.mmap, weights_only=True))


class Safetensors(PerRank):
    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__(rank)
        del ranks
        import safetensors
        import safetensors.torch

        self._save_file = safetensors.torch.save_file
        self._open = safetensors.safe_open

    def save(self, path: Path, state: State) -> None:
        file = self.file(path, ".safetensors")
        self._save_file(state, str(file))
        sync(file)
        sync(path)

    def load(self, path: Path, state: State) -> None:
        with self._open(str(self.file(path, ".safetensors")), framework="pt") as found:
            for name, tensor in state.items():
                tensor.copy_(found.get_tensor(name))


def copy_into(state: State, found: State) -> None:
    for name, tensor in state.items():
        tensor.copy_(found[name])


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

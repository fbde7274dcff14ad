"""Tensors that lie in files of others, mapped into memory: what a format's reader makes of a path.

Pages come in as they are read and may go again, so that a checkpoint can be larger than memory. Sizes were checked
against the files before anything is touched; a file that is cut short while it is mapped ends the process, as with
every reader that maps files.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ftrain.checkpoint.state.items import torch_dtype
from ftrain.checkpoint.state.source import TensorInfo, Wanted
from ftrain.core.layout import ITEM_BYTES, Box, strides
from ftrain.errors import CorruptCheckpoint, StorageError, UsageError
from ftrain.storage.opening import is_url


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the elements of a box lie: `offset` bytes into a file, with strides in elements."""

    file: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor. Where it lies is looked up when it is needed: that may need another look into its file."""

    box: Box
    find: Callable[[], Extent]


class Files:
    """The files below a directory, each mapped once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._maps: dict[str, memoryview] = {}

    def path(self, name: str) -> Path:
        """Raises `CorruptCheckpoint` for a name that is not simply that of a file in this directory."""
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CorruptCheckpoint(f"{self._directory}: refers to {name[:200]!r}, which is no file in this directory")
        return self._directory / name

    def bytes(self, name: str) -> memoryview:
        """All of a file. Writes to it stay in memory. Raises `CorruptCheckpoint` where it is not there."""
        if name not in self._maps:
            path = self.path(name)
            try:
                with path.open("rb") as file:
                    empty = not file.seek(0, 2)
                    # A private mapping: torch has no tensors that cannot be written to.
                    data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except FileNotFoundError:
                raise CorruptCheckpoint(f"{path}: is named by the checkpoint, but is not there") from None
            except OSError as error:
                raise StorageError(f"cannot read {path}: {error.strerror}") from error
            self._maps[name] = memoryview(data)
        return self._maps[name]


class MappedSource:
    """A checkpoint of another format, as a `TensorSource`."""

    def __init__(
        self,
        url: str,
        files: Files,
        tensors: Mapping[str, TensorInfo],
        parts: Mapping[str, Sequence[Part]],
        *,
        step: int = 0,
        names: Collection[str] | None = None,
        skipped: int = 0,
    ) -> None:
        self._url = url
        self._files = files
        self._tensors = tensors
        self._parts = parts
        self._step = step
        self._names = names
        self.skipped = skipped  # values that are no tensors

    @property
    def url(self) -> str:
        return self._url

    @property
    def step(self) -> int:
        return self._step

    @property
    def names(self) -> Collection[str] | None:
        return self._names

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, wanted: Sequence[Wanted]) -> None:
        for one in wanted:
            for part in self._parts[one.key]:
                common = part.box.intersect(one.box)
                if common is not None:
                    there, here = self._view(one.key, part), one.into.detach()
                    _within(here, one.box, common).copy_(_within(there, part.box, common))

    def whole(self, key: str) -> torch.Tensor | None:
        """The tensor where it lies, if it is there in one piece and in C order; its pages come in when it is read."""
        parts = self._parts[key]
        if len(parts) != 1 or parts[0].box.shape != self._tensors[key].shape:
            return None
        view = self._view(key, parts[0])
        return view if view.is_contiguous() else None

    def _view(self, key: str, part: Part) -> torch.Tensor:
        """The part, straight from the map. Raises `CorruptCheckpoint` where the file is too short for it."""
        dtype = self._tensors[key].dtype
        if not part.box.volume:
            return torch.empty(part.box.shape, dtype=torch_dtype(dtype))
        extent = part.find()
        data = self._files.bytes(extent.file)
        count = 1 + sum((size - 1) * step for size, step in zip(part.box.shape, extent.strides, strict=True))
        end = extent.offset + count * ITEM_BYTES[dtype]
        if extent.offset < 0 or min(extent.strides, default=0) < 0 or end > len(data):
            raise CorruptCheckpoint(
                f"{self._files.path(extent.file)}: tensor {key} is said to be at offset {extent.offset} and to end at "
                f"{end}, but the file has {len(data)} bytes"
            )
        flat = torch.frombuffer(data, dtype=torch_dtype(dtype), count=count, offset=extent.offset)
        return flat.as_strided(part.box.shape, extent.strides)


def contiguous(shape: Sequence[int], file: str, offset: int) -> Extent:
    """Where elements lie in C order."""
    return Extent(file, offset, strides(Box((0,) * len(shape), tuple(shape))))


def one_part(shape: tuple[int, ...], extent: Extent) -> list[Part]:
    """A tensor in one piece."""
    return [Part(Box((0,) * len(shape), shape), lambda: extent)]


def checked_shape(sizes: object, key: str, where: str) -> tuple[int, ...]:
    """Raises `CorruptCheckpoint` for what is no shape of a tensor that memory could ever hold."""
    if not isinstance(sizes, list | tuple) or len(sizes) > 64:
        raise CorruptCheckpoint(f"{where}: tensor {key[:200]} has no shape")
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes) or prod(sizes) >= 1 << 62:
        raise CorruptCheckpoint(f"{where}: tensor {key[:200]} has the shape {str(sizes)[:200]}")
    return tuple(sizes)


def local_path(path: str | Path) -> Path:
    """Raises `UsageError` for a URL."""
    if is_url(str(path)):
        raise UsageError(f"{path}: other formats than ftrain's are read from file systems only; copy it here first")
    return Path(path)


def _within(tensor: torch.Tensor, box: Box, part: Box) -> torch.Tensor:
    """The part of a tensor that is a box."""
    for dim, (at, begin, size) in enumerate(zip(box.offset, part.offset, part.shape, strict=True)):
        tensor = tensor.narrow(dim, begin - at, size)
    return tensor

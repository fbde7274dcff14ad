"""What leaves for another format: tensors under the names that they get there, piece by piece, in order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ftrain.checkpoint.state.items import torch_dtype
from ftrain.checkpoint.state.source import TensorSource
from ftrain.checkpoint.tools.stream import Piece, pieces
from ftrain.checkpoint.wire import as_bytes
from ftrain.core.layout import item_bytes
from ftrain.errors import StorageError, UsageError

__all__ = ["Outgoing", "Piece", "data_of", "new_directory", "new_file", "outgoing_pieces"]

EXPORTED_SUFFIX = ".exporting"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor under its new name, of the dtype that it gets."""

    name: str
    key: str  # in the checkpoint
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = item_bytes(self.dtype, self.name)
        for size in self.shape:
            count *= size
        return count


def outgoing_pieces(source: TensorSource, outgoing: Sequence[Outgoing]) -> Iterator[Piece]:
    """The tensors in order, each in pieces of bounded size in C order, converted where that is asked for."""
    dtypes = {one.key: torch_dtype(one.dtype) for one in outgoing}
    for piece in pieces(source, [one.key for one in outgoing]):
        wanted = dtypes[piece.key]
        yield piece if piece.tensor.dtype == wanted else Piece(piece.key, piece.box, piece.tensor.to(wanted))


def data_of(one: Outgoing, pieces: Iterator[Piece]) -> Iterator[memoryview]:
    """The next tensor's bytes, which has to be this one."""
    left = one.nbytes
    while left:
        piece = next(pieces)
        assert piece.key == one.key, f"{piece.key} came where {one.key} was to come"
        data = as_bytes(piece.tensor).numpy().data
        left -= len(data)
        yield data


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory that appears under its name when all in it is written. Raises `UsageError` where there is one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists already; export to a new place")
    building = path.with_name(f".{path.name}{EXPORTED_SUFFIX}")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        yield building
        if path.is_dir():
            path.rmdir()  # it was empty
        building.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is durable, and appears under its name, when all of it is written."""
    if path.exists():
        raise UsageError(f"{path} exists already; export to a new place")
    building = path.with_name(f".{path.name}{EXPORTED_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with building.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        building.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        building.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

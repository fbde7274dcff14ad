"""TensorStore and zarr-python: a zarr v3 array per tensor, chunks of whole rows, a folder per rank.

TensorStore keeps its arrays in an OCDBT database, written by one transaction: the fastest that it has for many tensors.
zarr-python writes two files or more per tensor; one syncfs makes them durable, which costs less than an fsync of each.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import torch
from peers import PerRank
from states import State

CHUNK_BYTES = 16 << 20
CACHE_BYTES = 100 << 20  # for the nodes of the database
OPEN_MAX = 256  # arrays that are in work at the same time


class TensorStore(PerRank):
    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__(rank)
        del ranks
        import tensorstore

        self._tensorstore = tensorstore

    def save(self, path: Path, state: State) -> None:
        asyncio.run(self._write_all(self.file(path), state))

    def load(self, path: Path, state: State) -> None:
        asyncio.run(self._read_all(self.file(path), state))

    async def _write_all(self, folder: Path, state: State) -> None:
        context, transaction = self._context(), self._tensorstore.Transaction()

        async def write(name: str, tensor: torch.Tensor) -> None:
            array = bits(tensor).numpy()
            grid = {"name": "regular", "configuration": {"chunk_shape": chunk_of(tensor)}}
            codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
            metadata = {"shape": array.shape, "data_type": str(array.dtype), "chunk_grid": grid, "codecs": codecs}
            spec = {**spec_of(folder, name), "metadata": metadata}
            store = await self._tensorstore.open(spec, create=True, context=context, transaction=transaction)
            await store.write(array)

        await bounded(write(name, tensor) for name, tensor in state.items())
        await transaction.commit_async()

    async def _read_all(self, folder: Path, state: State) -> None:
        context = self._context()

        async def read(name: str, tensor: torch.Tensor) -> None:
            store = await self._tensorstore.open(spec_of(folder, name), context=context)
            await self._tensorstore.array(bits(tensor).numpy()).write(store)

        await bounded(read(name, tensor) for name, tensor in state.items())

    def _context(self) -> Any:
        """A new one each time: nothing may come from the cache of an earlier save or load."""
        return self._tensorstore.Context({"file_io_sync": True, "cache_pool": {"total_bytes_limit": CACHE_BYTES}})


class ZarrPython(PerRank):
    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__(rank)
        del ranks
        import zarr
        from zarr.core.buffer.cpu import NDBuffer

        self._zarr = zarr
        self._buffer = NDBuffer.from_numpy_array

    def save(self, path: Path, state: State) -> None:
        folder = self.file(path)
        group = self._zarr.create_group(store=str(folder))
        for name, tensor in state.items():
            array = bits(tensor).numpy()
            made = group.create_array(
                name, shape=array.shape, chunks=chunk_of(tensor), dtype=array.dtype, compressors=None, filters=None
            )
            made[...] = array
        syncfs(folder)

    def load(self, path: Path, state: State) -> None:
        group = self._zarr.open_group(store=str(self.file(path)), mode="r")
        for name, tensor in state.items():
            array: Any = group[name]
            array.get_basic_selection(Ellipsis, out=self._buffer(bits(tensor).numpy()))


def spec_of(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}}


async def bounded(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all, at most OPEN_MAX at a time."""
    free = asyncio.Semaphore(OPEN_MAX)

    async def one(work: Coroutine[Any, Any, None]) -> None:
        async with free:
            await work

    await asyncio.gather(*(one(work) for work in works))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that numpy and zarr know."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def chunk_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Whole rows, about CHUNK_BYTES of them."""
    row_bytes = max(1, tensor.nbytes // max(1, tensor.shape[0]))
    return (max(1, min(tensor.shape[0], CHUNK_BYTES // row_bytes)), *tensor.shape[1:])


def syncfs(path: Path) -> None:
    """Make all of the file system durable that `path` is on."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)

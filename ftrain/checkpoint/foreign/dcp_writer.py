"""Writes a checkpoint that torch.distributed.checkpoint reads, by its own writer, one shard at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ftrain.checkpoint.foreign.outgoing import Outgoing, new_directory
from ftrain.checkpoint.state.items import torch_dtype
from ftrain.checkpoint.state.source import TensorInfo, TensorSource, Wanted
from ftrain.checkpoint.tools.stream import boxes
from ftrain.core.layout import Box


def write_dcp(directory: Path, outgoing: Sequence[Outgoing], source: TensorSource, names: Sequence[str]) -> list[Path]:
    """A new directory; large tensors are cut into shards of bounded size, which any reader of DCP puts together.

    `names` are those of objects that names of tensors begin with, if they do.
    """
    with new_directory(directory) as building, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing is distributed here, which is as it should be
        writer = dcp.FileSystemWriter(building, single_file_per_rank=True)
        planner = _Planner({one.name: one for one in outgoing}, source, names)
        dcp.save({one.name: None for one in outgoing}, storage_writer=writer, planner=planner, no_dist=True)
    return [directory]


class _Planner(dcp.DefaultSavePlanner):
    """Knows what is to be written, and reads it when its turn comes."""

    def __init__(self, outgoing: Mapping[str, Outgoing], source: TensorSource, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names
        self._outgoing = outgoing
        self._source = source

    def create_local_plan(self) -> SavePlan:
        items = [item for one in self._outgoing.values() for item in _items(one)]
        self.plan = SavePlan(items, planner_data={name: self._path(name) for name in self._outgoing})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        one, data = self._outgoing[write_item.index.fqn], write_item.tensor_data
        assert data is not None, "only tensors were planned"
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        into = torch.empty(box.shape, dtype=torch_dtype(self._source.tensors[one.key].dtype))
        if box.volume:
            self._source.read([Wanted(one.key, box, into)])
        return into.to(torch_dtype(one.dtype))

    def _path(self, name: str) -> tuple[str, ...]:
        """Where it is in the nested state."""
        owner, _, rest = name.partition(".")
        return (owner, rest) if rest and owner in self._names else (name,)


def _items(one: Outgoing) -> list[WriteItem]:
    shape = torch.Size(one.shape)
    parts = list(boxes(TensorInfo(one.dtype, one.shape), one.name)) or [Box((0,) * len(one.shape), one.shape)]
    properties = TensorProperties(dtype=torch_dtype(one.dtype))
    made: list[WriteItem] = []
    for number, box in enumerate(parts):
        chunk: Any = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
        index = MetadataIndex(one.name, chunk.offsets, number)
        made.append(WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, shape)))
    return made

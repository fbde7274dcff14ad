"""From a file of another format to a checkpoint of ftrain's."""

from __future__ import annotations

import mmap
import tempfile
from array import array
from pathlib import Path

import torch

from ftrain.checkpoint.exchange import encode_plain
from ftrain.checkpoint.foreign.mapped import MappedSource
from ftrain.checkpoint.foreign.opening import open_foreign
from ftrain.checkpoint.peers import Alone
from ftrain.checkpoint.state.items import item_of, torch_dtype
from ftrain.checkpoint.state.source import Wanted
from ftrain.checkpoint.tools.stream import boxes
from ftrain.checkpoint.writing.agreement import Plans
from ftrain.checkpoint.writing.target import Target
from ftrain.core.layout import whole
from ftrain.errors import CheckpointNotFound, UsageError
from ftrain.storage.base import Effort

EFFORT = Effort(threads=2)


def take_in(path: str | Path, into: str | Path, name: str, step: int | None) -> MappedSource:
    """Make a checkpoint at `into` of what lies at `path`, and return that.

    Its tensors come under `name`, or under their own names where the file has several objects or `name` is empty.
    Bytes go from the file to the checkpoint without being held in memory; only a tensor in several pieces is put
    together first, in a temporary file beside `into`. Raises `CheckpointNotFound` where there is nothing that ftrain
    reads.
    """
    source = open_foreign(path)
    if source is None:
        raise CheckpointNotFound(
            f"{path}: neither safetensors, nor a file of torch.save, nor a directory of torch.distributed.checkpoint"
        )
    if not source.tensors:
        raise UsageError(f"{path} has no tensor")
    if name and not name.isidentifier():
        raise UsageError(f"--name {name!r}: a name has letters, digits and underscores only")
    named = source.names is None and name
    prefix = f"{name}." if named else ""
    names = [name] if named else list(source.names or dict.fromkeys(key.partition(".")[0] for key in source.tensors))
    target = Target(into, source.step if step is None else step)
    target_parent = Path(into).absolute().parent
    target_parent.mkdir(parents=True, exist_ok=True)
    held: dict[str, torch.Tensor] = {}
    for key in source.tensors:
        lying = source.whole(key)
        held[key] = lying if lying is not None else _assembled(source, key, target_parent)
    items = [item_of(f"{prefix}{key}", tensor) for key, tensor in held.items()]
    agreed = Plans().agree([item.spec for item in items], Alone())
    by_key = {item.spec.key: item.local for item in items}
    # A module takes it, and a dict of tensors, too.
    plain = encode_plain({"tracked": {one: {"extra": {}, "values": {}} for one in names}})
    addresses = array("Q", [by_key[write.spec.key].data_ptr() for write in agreed.pack.writes])
    target.commit(agreed, Alone(), lambda: addresses, plain, EFFORT)
    return source


def _assembled(source: MappedSource, key: str, directory: Path) -> torch.Tensor:
    """The tensor in one piece, in a file without a name, so that it need not fit into memory."""
    info = source.tensors[key]
    empty = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
    if not empty.numel():
        return torch.empty(info.shape, dtype=empty.dtype)
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(empty.nbytes)
        memory = mmap.mmap(file.fileno(), empty.nbytes)
    made = torch.frombuffer(memory, dtype=empty.dtype, count=empty.numel()).reshape(info.shape)
    for box in boxes(info, key):
        part = made[tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))]
        source.read([Wanted(key, box if info.shape else whole(()), part)])
    return made

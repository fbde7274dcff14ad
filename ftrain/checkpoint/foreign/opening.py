"""Which format a path is of: by its name, and by what lies there."""

from __future__ import annotations

from pathlib import Path

from ftrain.checkpoint.foreign.dcp import is_dcp, open_dcp
from ftrain.checkpoint.foreign.mapped import MappedSource
from ftrain.checkpoint.foreign.safetensors import is_safetensors, open_safetensors
from ftrain.checkpoint.foreign.torch_file import is_torch_file, open_torch_file


def open_foreign(path: str | Path) -> MappedSource | None:
    """What lies at a path of the file system: safetensors, a torch file or DCP; None where it is none of these.

    Nothing in it is executed. Raises `CorruptCheckpoint` where it is one, but damaged, or holds other than tensors and
    plain data.
    """
    place = Path(path)
    if is_safetensors(place):
        return open_safetensors(place)
    if is_dcp(place):
        return open_dcp(place)
    if is_torch_file(place):
        return open_torch_file(place)
    return None

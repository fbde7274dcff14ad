"""From a checkpoint, or a file of another format, to another format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftrain.checkpoint.foreign.outgoing import Outgoing, outgoing_pieces
from ftrain.checkpoint.state.items import torch_dtype
from ftrain.checkpoint.state.source import TensorSource
from ftrain.checkpoint.tools.describe import names_of
from ftrain.checkpoint.tools.opening import Everything, matching, open_reference
from ftrain.errors import UnsupportedTensor, UsageError

FORMATS = ("safetensors", "torch", "dcp", "zarr")
_SUFFIXES = {".pt": "torch", ".pth": "torch", ".bin": "torch", ".zarr": "zarr", ".safetensors": "safetensors"}


@dataclass(frozen=True, slots=True)
class Exported:
    files: tuple[Path, ...]
    tensors: int
    nbytes: int


def format_of(path: Path, asked: str) -> str:
    """What was asked for, or what the name suggests. Raises `UsageError`."""
    if asked and asked not in FORMATS:
        raise UsageError(f"--to {asked}: give one of {', '.join(FORMATS)}")
    return asked or _SUFFIXES.get(path.suffix, "safetensors")


def export(
    reference: str,
    path: Path,
    to: str,
    *,
    name: str = "",
    everything: bool = False,
    only: Sequence[str] | None = None,
    dtype: str = "",
    shard_bytes: int = 5_000_000_000,
) -> Exported:
    """Write tensors of a checkpoint to a new place, in bounded memory.

    By default those of its one module, under the module's own names; `name` chooses another object, `everything` takes
    all under their keys in the checkpoint. Floating-point tensors become `dtype` where that is given. Raises
    `UsageError` where it is not clear what to take, and `CorruptCheckpoint` where bytes are damaged.
    """
    source = open_reference(reference)
    prefix = "" if everything else _prefix(source, name)
    chosen = [key for key in matching(source.tensors, only) if key.startswith(prefix)]
    if not chosen:
        raise UsageError(f"{reference} has no tensors of {prefix.rstrip('.')!r} that match: nothing to export")
    outgoing = [_outgoing(source, key, prefix, dtype) for key in chosen]
    files = _write(to, path, source, outgoing, list(source.names or ()) if everything else [], shard_bytes)
    return Exported(tuple(files), len(outgoing), sum(one.nbytes for one in outgoing))


def _write(
    to: str, path: Path, source: TensorSource, outgoing: Sequence[Outgoing], names: Sequence[str], shard_bytes: int
) -> list[Path]:
    pieces = outgoing_pieces(source, outgoing)
    if to == "safetensors":
        from ftrain.checkpoint.foreign.safetensors import write_safetensors

        return write_safetensors(path, outgoing, pieces, source.step, shard_bytes)
    if to == "torch":
        from ftrain.checkpoint.foreign.torch_writer import write_torch_file

        return write_torch_file(path, outgoing, pieces, source.step, names)
    if to == "dcp":
        from ftrain.checkpoint.foreign.dcp_writer import write_dcp

        return write_dcp(path, outgoing, source, names)
    from ftrain.checkpoint.foreign.plain_zarr import write_zarr

    return write_zarr(path, outgoing, pieces, source.step)


def _prefix(source: TensorSource, name: str) -> str:
    """What keys of the object begin with. Raises `UsageError`."""
    names = sorted(source.names or ())
    if not names or not isinstance(source, Everything):
        if name and name not in names:
            raise UsageError(f"--name {name}: {source.url} has no object of this name")
        return f"{name}." if name else ""
    if name:
        if name not in names:
            raise UsageError(f"--name {name}: {source.url} has {', '.join(names)}")
        return f"{name}."
    modules = names_of("module", source.checkpoint)
    if len(modules) != 1:
        what = f"several modules ({', '.join(modules)})" if modules else f"no module, but {', '.join(names)}"
        raise UsageError(f"{source.url} has {what}: choose one with --name, or take everything with --all")
    return f"{modules[0]}."


def _outgoing(source: TensorSource, key: str, prefix: str, dtype: str) -> Outgoing:
    info = source.tensors[key]
    if dtype:
        try:
            wanted = torch_dtype(dtype)
        except UnsupportedTensor as error:
            raise UsageError(f"--dtype {dtype}: {error}") from None
        if not wanted.is_floating_point:
            raise UsageError(f"--dtype {dtype}: give a floating-point type, such as bfloat16")
    floating = info.dtype.startswith(("float", "bfloat"))
    return Outgoing(key.removeprefix(prefix), key, dtype if dtype and floating else info.dtype, info.shape)

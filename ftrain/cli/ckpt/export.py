"""`ftrain ckpt export`: to safetensors, a torch file, DCP or plain zarr."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.output import AsJson, Only
from ftrain.errors import UsageError

_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,15})(|kB|MB|GB|TB)")


def export(
    reference: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="RUN@STEP, RUN@latest, a path; or a file, to convert it.")
    ],
    path: Annotated[Path, typer.Argument(metavar="OUT", help="A new file or directory.")],
    to: Annotated[
        str, typer.Option("--to", help="safetensors, torch, dcp or zarr. Left out: by OUT's name, else safetensors.")
    ] = "",
    name: Annotated[
        str, typer.Option("--name", help="What was tracked under this name; default: the one module.")
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="All tensors, under their keys in the checkpoint.")] = False,
    only: Only = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Convert floating-point tensors, as in bfloat16.")] = "",
    shard_size: Annotated[str, typer.Option("--shard-size", help="Of safetensors files at most.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's tensors for other tools. `model.safetensors` and its index are as Hugging Face has them."""
    from ftrain.checkpoint.tools.export import export as write
    from ftrain.checkpoint.tools.export import format_of

    if name and everything:
        raise UsageError("--name and --all exclude each other")
    chosen = format_of(path, to)
    done = write(
        reference,
        path,
        chosen,
        name=name,
        everything=everything,
        only=only,
        dtype=dtype,
        shard_bytes=_bytes(shard_size),
    )
    if as_json:
        files = [str(file) for file in done.files]
        output.dump({"format": chosen, "files": files, "tensors": done.tensors, "bytes": done.nbytes})
        return
    output.say(f"{output.count(done.tensors)} tensors, {output.size(done.nbytes)}, as {chosen}:")
    for file in done.files:
        output.say(f"  {file}")


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise UsageError(f"--shard-size {text}: give a size such as 5GB or 500MB")
    return int(found[1]) * _UNITS[found[2]]

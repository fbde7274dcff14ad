"""`ftrain ckpt import`: safetensors, a torch file or DCP as a checkpoint of ftrain's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.output import AsJson


def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="safetensors (also a directory), a torch file, DCP.")],
    into: Annotated[Path, typer.Argument(metavar="OUT", help="The directory that becomes the checkpoint.")],
    name: Annotated[
        str, typer.Option("--name", help="What the tensors are tracked as in the training script.")
    ] = "model",
    step: Annotated[int | None, typer.Option("--step", help="The number of steps that were done; default: 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of a file: for `ftrain.load`, or for `ftrain ckpt fork` to begin a run with it.

    Nothing in the file is executed: one that holds other than tensors and plain data is refused.
    """
    from ftrain.checkpoint.tools.taking_in import take_in

    source = take_in(path, into, name, step)
    if as_json:
        output.dump({"path": str(into), "tensors": len(source.tensors), "skipped": source.skipped})
        return
    output.say(f"{into}: {output.count(len(source.tensors))} tensors from {source.url}")
    if source.skipped:
        output.say(f"  {source.skipped} values that are no tensors were left out", "yellow")

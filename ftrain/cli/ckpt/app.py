"""The commands of `ftrain ckpt`, put together. None of them imports torch before it needs it."""

from __future__ import annotations

import typer

from ftrain.cli.ckpt.diff import diff
from ftrain.cli.ckpt.export import export
from ftrain.cli.ckpt.fork import fork
from ftrain.cli.ckpt.importing import import_
from ftrain.cli.ckpt.ls import ls
from ftrain.cli.ckpt.pin import pin, unpin
from ftrain.cli.ckpt.prune import prune
from ftrain.cli.ckpt.show import show
from ftrain.cli.ckpt.verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command(help="List checkpoints.")(ls)
app.command(help="Show what a checkpoint holds, or what looks sick along a run.")(show)
app.command(help="Read every byte of checkpoints, and say which are whole.")(verify)
app.command(help="Compare two checkpoints tensor by tensor.")(diff)
app.command(help="Write safetensors, a torch file, DCP or plain zarr.")(export)
app.command("import", help="Make a checkpoint of safetensors, a torch file or DCP.")(import_)
app.command(help="Begin a new run with a commit of another, without copying it.")(fork)
app.command(help="Keep a commit under a name, whatever retention says.")(pin)
app.command(help="Take such a name away.")(unpin)
app.command(help="Remove commits of a run that nobody runs.")(prune)

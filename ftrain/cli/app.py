"""The commands of `ftrain`, put together. Importing this takes half a second: `main` is there before."""

from __future__ import annotations

import typer

from ftrain import __version__
from ftrain.cli.ckpt.app import app as ckpt
from ftrain.cli.coordinator import coordinator
from ftrain.cli.launch import launch
from ftrain.cli.secret import secret
from ftrain.cli.status import status

app = typer.Typer(
    help="Fault-tolerant training for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
    help="Start (or continue) a training job on this node; takes torchrun's flags.",
)(launch)
app.command(help="Run the coordinator by itself, outside of any node.")(coordinator)
app.command(help="Make the secret that all nodes of a run share.")(secret)
app.command(help="Show what a run is doing.")(status)
app.add_typer(ckpt, name="ckpt", help="Look at checkpoints, prove, compare, export, fork and prune them.")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and end.")) -> None:
    if version:
        print(f"ftrain {__version__}")
        raise typer.Exit

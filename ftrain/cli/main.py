"""The `ftrain` command."""

from __future__ import annotations

import sys

import typer

from ftrain import __version__
from ftrain.cli.coordinator import coordinator
from ftrain.cli.launch import launch
from ftrain.cli.secret import secret
from ftrain.cli.status import status
from ftrain.errors import FtrainError

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


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and end.")) -> None:
    if version:
        print(f"ftrain {__version__}")
        raise typer.Exit


def main() -> None:
    """A user's mistake ends in one line and its exit code, never in a traceback."""
    try:
        app()
    except FtrainError as error:
        print(f"ftrain: {error}", file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None


if __name__ == "__main__":
    main()

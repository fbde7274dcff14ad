"""`ftrain secret FILE`: make the secret that the nodes of a run share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftrain.control.secret import Secret


def secret(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write. It must not exist yet.")],
) -> None:
    """Make the secret that lets the nodes of one run trust each other.

    Copy FILE to every node, readable by you only, and give it to each launcher with --secret FILE. Who holds it can
    join, stop and read the run.
    """
    made = Secret.create(path)
    typer.echo(f"{path}: a new run secret, {made.fingerprint}. Copy it to every node and start each with --secret.")

"""`ftrain ckpt pin` and `unpin`: commits that stay under a name."""

from __future__ import annotations

from typing import Annotated

import typer

from ftrain.checkpoint.catalogue import catalogue, find
from ftrain.checkpoint.tools.pinning import keep, let_go
from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.output import AsJson
from ftrain.errors import UsageError


def pin(
    reference: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="RUN@STEP, RUN@latest, or a path in a run.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="It is RUN@NAME from now on.")],
    why: Annotated[str, typer.Option("--why", help="For those who find it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Keep a commit's files, whatever the run's retention says, until it is unpinned. The run may be running."""
    commit = find(reference)
    if not keep(commit, name, why):
        raise UsageError(f"{commit.url} is in no run: nothing removes it, so there is nothing to pin")
    if as_json:
        output.dump({"pinned": commit.url, "name": name, "step": commit.step})
    else:
        output.say(f"{commit.url} stays as {name!r}")


def unpin(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's directory.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="As it was pinned.")],
    as_json: AsJson = False,
) -> None:
    """Take a pin away. A commit that the run has let go of goes when the run, or `prune`, removes commits next."""
    storage, _ = catalogue(run).run
    path = let_go(storage, name)
    if as_json:
        output.dump({"unpinned": f"{storage.url}/{path}", "name": name})
    else:
        output.say(f"{storage.url}/{path} is not pinned as {name!r} any more")

"""`ftrain ckpt fork`: a new run that begins with a commit of another."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ftrain.checkpoint.tools.fork import fork as begin
from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.output import AsJson
from ftrain.errors import UsageError


def fork(
    reference: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="RUN@STEP, RUN@latest, a path, or RUN.")],
    run_dir: Annotated[str, typer.Argument(metavar="NEW_RUN_DIR", help="The new run's directory.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Take over the modules alone: new optimizer, data, step 0.")
    ] = False,
    own_options: Annotated[
        bool,
        typer.Option("--own-options", help="Learning rate, weight decay, ... are the script's, not the checkpoint's."),
    ] = False,
    step: Annotated[int | None, typer.Option("--step", help="Count from this step instead.", min=0)] = None,
    as_json: AsJson = False,
) -> None:
    """Begin a new run with a commit, without copying it. The commit is pinned in its own run."""
    if weights_only and own_options:
        raise UsageError("--weights-only leaves the optimizer to the script already; --own-options adds nothing")
    done = begin(reference, run_dir, weights_only=weights_only, own_options=own_options, step=step)
    if as_json:
        output.dump(asdict(done))
        return
    what = "the weights of " if weights_only else ""
    output.say(f"{done.run}: a new run that goes on from step {done.step}, with {what}{done.origin}")
    if done.pin:
        output.say(f"  which stays as long as its run has the pin {done.pin!r} (`ftrain ckpt unpin`)")
    output.say(f"  start it with:  ftrain launch --run-dir {run_dir} ...")

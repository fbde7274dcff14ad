"""`ftrain ckpt verify`: every byte of one checkpoint, or of all of a run."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ftrain.checkpoint.catalogue import Commit, catalogue, find, read_manifest
from ftrain.checkpoint.tools.verify import verify as prove
from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.output import AsJson
from ftrain.errors import CorruptCheckpoint, ExitCode


def verify(
    reference: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="RUN@STEP, RUN@latest, a path, or RUN.")],
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Look at the other checkpoints, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint, or of all checkpoints of a run, and end with 74 at the first bad one."""
    if "@" in reference.rpartition("/")[2]:
        commits = [find(reference)]
    else:
        found = catalogue(reference)  # a run's journal is proved by reading it
        commits = [*found.commits, *found.kept]
    rows: list[dict[str, Any]] = []
    for commit in commits:
        row = _prove(commit)
        rows.append(row)
        if not as_json:
            _show(row)
        if not row["whole"] and not keep_going:
            break
    if as_json:
        output.dump({"checkpoints": rows, "whole": all(row["whole"] for row in rows)})
    if not all(row["whole"] for row in rows):
        raise typer.Exit(int(ExitCode.STORAGE))


def _prove(commit: Commit) -> dict[str, Any]:
    row: dict[str, Any] = {"step": commit.step, "path": commit.url}
    with Progress(
        TextColumn("step {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        try:
            total = sum(pack.file_bytes for pack in read_manifest(commit).packs)
            task = progress.add_task(str(commit.step), total=total)
            proof = prove(commit, lambda nbytes: progress.advance(task, nbytes))
        except CorruptCheckpoint as error:
            return {**row, "whole": False, "problem": str(error)}
    return {
        **row,
        "whole": True,
        "problem": "",
        "bytes": proof.bytes_read,
        "tensors": proof.tensors,
        "packs": proof.packs,
        "strange": list(proof.strange),
    }


def _show(row: dict[str, Any]) -> None:
    if not row["whole"]:
        output.say(f"step {row['step']}: DAMAGED: {row['problem']}", "bold red")
        return
    read = f"{output.size(row['bytes'])}, {output.count(row['tensors'])} tensors, {row['packs']} packs"
    output.say(f"step {row['step']}: whole ({read})", "green")
    if row["strange"]:
        output.say(f"  beside it lie files that are not ftrain's: {', '.join(row['strange'])}", "yellow")

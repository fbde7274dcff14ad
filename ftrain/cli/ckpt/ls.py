"""`ftrain ckpt ls`: the checkpoints of a run, or of a directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer
from rich.text import Text

from ftrain.checkpoint.catalogue import Catalogue, Commit, catalogue, problem_of
from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.output import AsJson
from ftrain.errors import ExitCode
from ftrain.spec import DEFAULT_RUN_ID

METRICS_MAX = 3  # in the table
THREADS = 8


def ls(
    place: Annotated[str, typer.Argument(metavar="PLACE", help="A run's directory, or one with saved checkpoints.")],
    as_json: AsJson = False,
) -> None:
    """List checkpoints, oldest first: age, size, ranks, metrics, pins, and whether all files are there."""
    found = catalogue(place)
    with ThreadPoolExecutor(THREADS, "ftrain-ls") as pool:
        problems = list(pool.map(problem_of, (*found.commits, *found.kept)))
    rows = [_row(commit, problem) for commit, problem in zip((*found.commits, *found.kept), problems, strict=True)]
    if as_json:
        output.dump({"place": found.place, "commits": rows})
    else:
        _show(found, rows)
    if any(problems):
        raise typer.Exit(int(ExitCode.STORAGE))


def _row(commit: Commit, problem: str) -> dict[str, Any]:
    return {
        "step": commit.step,
        "generation": commit.attempt.generation,
        "unix_seconds": commit.unix_seconds,
        "bytes": commit.payload_bytes,
        "world_size": commit.world_size,
        "metrics": dict(commit.metrics),
        "pins": list(commit.pins),
        "origin": commit.origin,
        "path": commit.path,
        "manifest_sha256": commit.manifest_sha256,
        "whole": not problem,
        "problem": problem,
    }


def _show(found: Catalogue, rows: Sequence[dict[str, Any]]) -> None:
    run = found.history.run if found.history is not None else None
    total = output.size(sum(row["bytes"] for row in rows if not row["origin"]))
    ended = found.history.finish if found.history is not None else None
    said = ended.summary.partition("\n")[0] if ended is not None else ""
    state = f"; {said}" if said else ""
    name = f"run {run.run_id!r}, " if run is not None and run.run_id != DEFAULT_RUN_ID else ""
    output.say(f"{found.place}: {name}{len(rows)} checkpoint{'' if len(rows) == 1 else 's'}, {total}{state}")
    names = list(_some(name for row in rows for name in row["metrics"]))
    table = output.table(
        "step", "age", "size", "ranks", *names, "pins", "files", "where", right=["step", "age", "size", "ranks", *names]
    )
    for row in rows:
        table.add_row(
            str(row["step"]),
            output.age(row["unix_seconds"]),
            output.size(row["bytes"]),
            str(row["world_size"]),
            *(output.number(row["metrics"][name]) if name in row["metrics"] else "" for name in names),
            Text(" ".join(row["pins"])),
            Text("whole", "green") if row["whole"] else Text("damaged", "bold red"),
            Text(f"{row['path']} of {row['origin']}" if row["origin"] else row["path"]),
        )
    if rows:
        output.console().print(table)
    for row in rows:
        if row["problem"]:
            output.say(f"step {row['step']}: {row['problem']}", "red")


def _some(names: Iterable[str]) -> list[str]:
    """The first few, each once."""
    return list(dict.fromkeys(names))[:METRICS_MAX]

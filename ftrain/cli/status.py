"""`ftrain status`: what a run is doing, asked from its coordinator; how it ended, read from its journal."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ftrain.agent.report import commits
from ftrain.agent.story import number
from ftrain.cli import options
from ftrain.cli.running import SECRET_NAME, WHEREABOUTS
from ftrain.control.client import fetch_status
from ftrain.control.secret import Secret
from ftrain.core.run_state import Phase
from ftrain.errors import FtrainError, ProtocolError, Refused, Unavailable, UsageError
from ftrain.storage import open_storage
from ftrain.storage.base import Storage
from ftrain.storage.history import read_history


def status(
    run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The run's directory or URL, as for launch.")],
    secret: Annotated[Path | None, typer.Option("--secret", help="For runs of several nodes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show the run's phase, ranks, commits and interruptions; of a run that has ended, how."""
    url, run_dir = options.run_place(run, "RUN_DIR")
    try:
        found = json.loads((run_dir / WHEREABOUTS).read_text())
        endpoint = f"{found['host']}:{found['port']}"
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{run}: no run has been started here") from None
    try:
        picture = asyncio.run(fetch_status(endpoint, Secret.load(secret or run_dir / SECRET_NAME)))
    except (Unavailable, Refused, ProtocolError) as error:  # of a run that is over, others may have the port by now
        picture = _ended(open_storage(url or str(run_dir)), error)
    if as_json:
        print(json.dumps(picture))
    else:
        _show(picture)


def _ended(storage: Storage, error: FtrainError) -> dict[str, Any]:
    """The picture of a run that has come to its end. Raises `error`, with what is there, for one that has not."""
    history, _ = read_history(storage)
    if history.run is None or history.finish is None:
        if not isinstance(error, Unavailable):
            raise error
        steps = [body.attempt.step for _, body in history.commits]
        newest = f"its newest commit is of step {steps[-1]}" if steps else "it has no commit"
        raise Unavailable(f"{error} The run has not come to its end: {newest}; start it again to go on.") from None
    return {
        "run_id": history.run.run_id,
        "phase": Phase.OVER.value,
        "generation": history.generation.generation if history.generation is not None else 0,
        "step": history.finish.step,
        "metrics": {},
        "nodes": [],
        "attempts": [],
        "commits": commits(history),
        "interruptions": [],
        "exit_code": history.finish.exit_code,
        "summary": history.finish.summary,
    }


def _show(picture: dict[str, Any]) -> None:
    console = Console()
    metrics = "  ".join(f"{name} {number(value)}" for name, value in picture["metrics"].items())
    console.print(f"[bold]{picture['run_id']}[/]  {picture['phase']}  generation {picture['generation']}  {metrics}")
    if "exit_code" in picture:  # it was read from the journal
        console.print(f"{picture['summary']} (exit code {picture['exit_code']})")
    ranks = Table("rank", "node", "pid", "steps", "phase", "stall")
    for node in picture["nodes"]:
        for rank in node["ranks"]:
            ranks.add_row(
                str(rank["rank"]),
                f"{node['group_rank']} ({node['host']})",
                str(rank["pid"]),
                str(rank["step"]),
                rank["phase"],
                f"{rank['stall_seconds'] * 1e3:.1f} ms",
            )
    if picture["nodes"]:
        console.print(ranks)
    for commit in picture["commits"]:
        console.print(f"commit of step {commit['step']}  {commit['bytes'] / 1e6:.1f} MB  {commit['path']}")
    for attempt in picture["attempts"]:
        what = "checkpoint" if attempt["persist"] else "snapshot"
        console.print(f"{what} of step {attempt['step']}: {attempt['stage']}")
    for one in picture["interruptions"]:
        took = f", back after {one['recovery_seconds']:.2f} s" if "recovery_seconds" in one else ""
        console.print(
            f"[yellow]generation {one['generation']}[/]: {one['summary']} ({one['redone_steps']} steps redone{took})"
        )

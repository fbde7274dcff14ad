"""`ftrain status`: what a run is doing, asked from its coordinator."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ftrain.agent.story import number
from ftrain.cli import options
from ftrain.cli.running import SECRET_NAME, WHEREABOUTS
from ftrain.control.client import fetch_status
from ftrain.control.secret import Secret
from ftrain.errors import UsageError


def status(
    run: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The run's directory or URL, as for launch.")],
    secret: Annotated[Path | None, typer.Option("--secret", help="For runs of several nodes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show the run's phase, ranks, commits and interruptions."""
    _, run_dir = options.run_place(run, "RUN_DIR")
    try:
        found = json.loads((run_dir / WHEREABOUTS).read_text())
        endpoint = f"{found['host']}:{found['port']}"
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{run}: no run has been started here") from None
    picture = asyncio.run(fetch_status(endpoint, Secret.load(secret or run_dir / SECRET_NAME)))
    if as_json:
        print(json.dumps(picture))
    else:
        _show(picture)


def _show(picture: dict[str, Any]) -> None:
    console = Console()
    metrics = "  ".join(f"{name} {number(value)}" for name, value in picture["metrics"].items())
    console.print(f"[bold]{picture['run_id']}[/]  {picture['phase']}  generation {picture['generation']}  {metrics}")
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
    console.print(ranks)
    for commit in picture["commits"]:
        console.print(f"commit of step {commit['step']}  {commit['bytes'] / 1e6:.1f} MB  {commit['path']}")
    if picture["attempt"] is not None:
        attempt = picture["attempt"]
        console.print(f"checkpoint of step {attempt['step']}: {attempt['stage']}")
    for one in picture["interruptions"]:
        took = f", back after {one['recovery_seconds']:.2f} s" if "recovery_seconds" in one else ""
        console.print(
            f"[yellow]generation {one['generation']}[/]: {one['summary']} ({one['redone_steps']} steps redone{took})"
        )

"""`ftrain ckpt prune`: remove commits of a run that nobody runs."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from ftrain.checkpoint.catalogue import Catalogue, catalogue
from ftrain.checkpoint.tools.prune import Plan, plan
from ftrain.checkpoint.tools.prune import prune as carry_out
from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.output import AsJson
from ftrain.cli.options import retention
from ftrain.errors import UsageError

WHEREABOUTS = "coordinator.json"
ANSWER_SECONDS = 2.0


def prune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's directory.")],
    keep: Annotated[
        int | None, typer.Option("--keep", help="So many of the newest commits stay; at least one.")
    ] = None,
    keep_every: Annotated[
        str, typer.Option("--keep-every", help="One stays every so often: 1000, 6h, or off.")
    ] = "off",
    keep_best: Annotated[
        list[str] | None, typer.Option("--keep-best", help="2:loss or 2:accuracy:max, as for launch; repeatable.")
    ] = None,
    keep_step: Annotated[list[int] | None, typer.Option("--keep-step", help="This one stays; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    stopped: Annotated[
        bool, typer.Option("--stopped", help="The run's coordinator was elsewhere, and you know that it is gone.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove commits, by the rules of `ftrain launch`. The newest one, pinned and damaged ones stay in any case.

    A run that is running removes its own (`ftrain launch --keep`), and is refused here.
    """
    found = catalogue(run)
    _ = found.run
    if keep is None and keep_every == "off" and not keep_best and not keep_step:
        raise UsageError("say what stays: --keep K, --keep-every STEPS, --keep-best K:METRIC, --keep-step STEP")
    decided = plan(found, retention(1 if keep is None else keep, keep_every, keep_best or ()), keep_step or ())
    removed: list[str] = []
    if not dry_run:
        living = _living(found, stopped)
        if living:
            raise UsageError(f"{found.place}: {living}; stop it first, or let it remove commits itself (--keep)")
        removed = carry_out(found, decided.remove)
    if as_json:
        output.dump({"removed": removed, **_as_json(decided), "dry_run": dry_run})
    else:
        _show(decided, dry_run)


def _living(found: Catalogue, stopped: bool) -> str:
    """Who seems to run it; "" where nobody does."""
    storage, history = found.run
    over = stopped or history.finish is not None or history.generation is None
    try:
        where = json.loads((Path(storage.url) / WHEREABOUTS).read_text())
        host, port, pid, on = str(where["host"]), int(where["port"]), int(where["pid"]), where["on"]
    except (OSError, ValueError, KeyError, TypeError):
        return "" if over else "who runs it cannot be seen from here; if you know that nobody does, add --stopped"
    if on == socket.gethostname():
        return f"process {pid} runs it" if _is_launcher(pid) else ""
    try:
        socket.create_connection((host, port), ANSWER_SECONDS).close()
    except (OSError, OverflowError):
        return (
            "" if over else f"it was started on {on}, which does not answer; if you know it to be gone, add --stopped"
        )
    return f"its coordinator answers at {host}:{port}"


def _is_launcher(pid: int) -> bool:
    try:
        return b"ftrain" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _show(decided: Plan, dry_run: bool) -> None:
    table = output.table("step", "age", "size", "", "why", right=["step", "age", "size"])
    rows = [(commit, "kept", reason) for commit, reason in decided.keep]
    rows += [(commit, "to be removed" if dry_run else "removed", "") for commit in decided.remove]
    for commit, what, reason in sorted(rows, key=lambda row: row[0].sequence):
        table.add_row(
            str(commit.step), output.age(commit.unix_seconds), output.size(commit.payload_bytes), what, reason
        )
    output.console().print(table)
    freed = output.size(sum(commit.payload_bytes for commit in decided.remove if not commit.origin))
    output.say(f"{len(decided.remove)} commits, {freed}, {'would be' if dry_run else 'were'} removed")


def _as_json(decided: Plan) -> dict[str, Any]:
    return {
        "keep": [{"step": commit.step, "why": reason} for commit, reason in decided.keep],
        "remove": [
            {"step": commit.step, "path": commit.path, "bytes": commit.payload_bytes} for commit in decided.remove
        ],
    }

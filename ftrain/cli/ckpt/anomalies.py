"""`ftrain ckpt show --anomalies`: where a run went wrong, and from where it can go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from ftrain.checkpoint.catalogue import Catalogue, catalogue, find, metrics_by_step
from ftrain.cli.ckpt import output

if TYPE_CHECKING:
    from ftrain.checkpoint.tools.anomalies import Anomaly, Look

SICK = 1  # what the command ends with where something is
ROWS_MAX = 20  # of each commit


def show_anomalies(reference: str, only: Sequence[str] | None, as_json: bool) -> None:
    """All commits of `RUN`, or the one of `RUN@STEP`, and the run's metrics."""
    from ftrain.checkpoint.tools.anomalies import look_along, look_at_metrics

    one = "@" in reference.rpartition("/")[2]
    found = None if one else catalogue(reference)
    commits = [find(reference)] if found is None else found.commits
    metrics = look_at_metrics(metrics_by_step(found.storage)) if found is not None and found.storage is not None else []
    looks = list(look_along(commits, only))
    clean = _last_clean(looks)
    if as_json:
        output.dump(
            {
                "looked_at": [look.commit.step for look in looks],
                "metrics": [_as_json(one) for one in metrics],
                "tensors": [_as_json(one) for look in looks for one in look.anomalies],
                "clean_until": clean.commit.step if clean is not None else None,
            }
        )
    else:
        _show(looks, metrics)
        _conclude(reference, found, looks, clean)
    if any(not look.is_clean for look in looks) or any(one.is_sick for one in metrics):
        raise typer.Exit(SICK)


def _last_clean(looks: Sequence[Look]) -> Look | None:
    """The newest commit before the first sick one; the newest of all where none is."""
    clean = None
    for look in looks:
        if not look.is_clean:
            break
        clean = look
    return clean


def _show(looks: Sequence[Look], metrics: Sequence[Anomaly]) -> None:
    if metrics:
        table = output.table("step", "metric", "what", right=["step"])
        for one in metrics:
            style = "bold red" if one.is_sick else "yellow"
            table.add_row(
                str(one.step), Text(one.where.removeprefix("metric ")), Text(f"{one.kind}: {one.what}", style)
            )
        output.console().print(table)
        output.say()
    if not any(look.anomalies for look in looks):
        return
    table = output.table("commit", "tensor", "what", right=["commit"])
    for look in looks:
        new = [one for one in look.anomalies if not one.since]
        for one in new[:ROWS_MAX]:
            style = "bold red" if one.is_sick else "yellow"
            table.add_row(str(one.step), Text(one.where), Text(f"{one.kind}: {one.what}", style))
        if len(new) > ROWS_MAX:
            table.add_row(
                str(look.commit.step), f"… and {len(new) - ROWS_MAX} more", "--only narrows it, --json has all"
            )
        since = len(look.anomalies) - len(new)
        if since:
            table.add_row(str(look.commit.step), f"{since} tensors", Text("as sick as in the commit before", "dim"))
    output.console().print(table)
    output.say()


def _conclude(reference: str, found: Catalogue | None, looks: Sequence[Look], clean: Look | None) -> None:
    sick = next((look for look in looks if not look.is_clean), None)
    if sick is None:
        steps = ", ".join(str(look.commit.step) for look in looks)
        output.say(f"no NaN and no infinity in the {len(looks)} commits that are here ({steps})", "green")
        return
    if found is None:
        return
    if clean is None:
        output.say(f"the oldest commit that is here, of step {sick.commit.step}, is sick already", "bold red")
        return
    good, bad = clean.commit.step, sick.commit.step
    output.say(f"step {good} is the last clean commit, step {bad} the first sick one")
    output.say(f"  what changed:   ftrain ckpt diff {reference}@{good} {reference}@{bad}")
    weights = "" if found.history is not None else " --weights-only"
    output.say(f"  go on from it:  ftrain ckpt fork {reference}@{good} NEW_RUN_DIR{weights}")


def _as_json(one: Anomaly) -> dict[str, Any]:
    return {"step": one.step, "kind": one.kind, "where": one.where, "what": one.what, "since": one.since}

"""`ftrain ckpt show`: what is in a checkpoint, and with --anomalies what looks sick along a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ftrain.checkpoint.catalogue import Commit, find, read_manifest
from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.anomalies import show_anomalies
from ftrain.cli.ckpt.output import AsJson, Only
from ftrain.errors import UsageError

if TYPE_CHECKING:
    from ftrain.checkpoint.state.source import TensorInfo
    from ftrain.checkpoint.tools.statistics import Statistics


def show(
    reference: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="RUN@STEP, RUN@latest, a path, or RUN.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors; --only does, too.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="With norms and NaNs: reads all of them.")] = False,
    anomalies: Annotated[
        bool, typer.Option("--anomalies", help="Look along all commits of RUN, and its metrics, for what is sick.")
    ] = False,
    only: Only = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds."""
    if anomalies:
        if tensors or stats:
            raise UsageError("--anomalies goes with --only and --json, not with --tensors or --stats")
        show_anomalies(reference, only, as_json)
        return
    from ftrain.checkpoint.tools.describe import describe
    from ftrain.checkpoint.tools.opening import Everything, matching, open_commit
    from ftrain.checkpoint.tools.statistics import statistics

    commit = find(reference)
    source = Everything(open_commit(commit))
    keys = matching(source.tensors, only) if tensors or stats or only else []
    figures = statistics(source, keys) if stats else {}
    head = {**_head(commit), "stored_bytes": source.checkpoint.stored_bytes, "codecs": source.checkpoint.codecs}
    objects = [
        {
            "name": one.name,
            "kind": one.kind,
            "tensors": one.tensors,
            "elements": one.elements,
            "bytes": one.nbytes,
            "dtypes": list(one.dtypes),
            "note": one.note,
        }
        for one in describe(source.checkpoint)
    ]
    if as_json:
        listed = [_as_json(key, source.tensors[key], figures.get(key)) for key in keys]
        output.dump({**head, "objects": objects, "tensors": listed})
        return
    _show_head(head)
    _show_objects(objects)
    if keys:
        _show_tensors({key: source.tensors[key] for key in keys}, figures)


def _head(commit: Commit) -> dict[str, Any]:
    manifest = read_manifest(commit)
    return {
        "step": commit.step,
        "generation": commit.attempt.generation,
        "path": commit.url,
        "unix_seconds": commit.unix_seconds,
        "bytes": commit.payload_bytes,
        "world_size": commit.world_size,
        "ftrain": manifest.ftrain,
        "format": manifest.format,
        "manifest_sha256": commit.manifest_sha256,
        "pins": list(commit.pins),
        "origin": commit.origin,
    }


def _show_head(head: dict[str, Any]) -> None:
    when = f", {output.age(head['unix_seconds'])} ago" if head["unix_seconds"] is not None else ""
    pins = f", pinned as {', '.join(head['pins'])}" if head["pins"] else ""
    output.say(f"step {head['step']}{when}{pins}", "bold")
    packed = f" ({output.size(head['stored_bytes'])} with {', '.join(head['codecs'])})" if head["codecs"] else ""
    output.say(
        f"{output.size(head['bytes'])}{packed} of {head['world_size']} ranks, ftrain {head['ftrain']}, {head['path']}"
    )


def _show_objects(objects: list[dict[str, Any]]) -> None:
    table = output.table(
        "name", "kind", "tensors", "elements", "size", "dtypes", "", right=["tensors", "elements", "size"]
    )
    for one in objects:
        table.add_row(
            Text(one["name"] or "(no name)"),
            one["kind"],
            output.count(one["tensors"]),
            output.count(one["elements"]),
            output.size(one["bytes"]),
            ", ".join(one["dtypes"]),
            Text(one["note"]),
        )
    output.console().print(table)


def _show_tensors(infos: dict[str, TensorInfo], figures: dict[str, Statistics]) -> None:
    numbers = ["norm", "mean", "largest"] if figures else []
    sick = ["NaN, Inf"] if figures else []
    table = output.table("tensor", "dtype", "shape", *numbers, *sick, right=numbers)
    for key, info in infos.items():
        row: list[str | Text] = [Text(key), info.dtype, Text(str(list(info.shape)))]
        if key in figures:
            one = figures[key]
            row += [Text(output.number(value)) for value in (one.norm, one.mean, one.max_abs)]
            row.append(Text("" if one.is_finite else f"{one.nans:,} NaN, {one.infs:,} Inf", "bold red"))
        table.add_row(*row)
    output.console().print(table)


def _as_json(key: str, info: TensorInfo, figures: Statistics | None) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key, "dtype": info.dtype, "shape": list(info.shape)}
    return {**row, **output.statistics(figures)} if figures is not None else row

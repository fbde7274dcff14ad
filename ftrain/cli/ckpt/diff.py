"""`ftrain ckpt diff`: two checkpoints, tensor by tensor."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ftrain.cli.ckpt import output
from ftrain.cli.ckpt.output import AsJson, Only

if TYPE_CHECKING:
    from ftrain.checkpoint.tools.compare import Change, Comparison
    from ftrain.checkpoint.tools.statistics import Statistics

DIFFERENT = 1  # as diff(1) ends
TOP = 20
_NAMED_MAX = 10


def diff(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="RUN@STEP, RUN@-2, a path to a checkpoint or file.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The same.")],
    only: Only = None,
    top: Annotated[int, typer.Option("--top", help="Show so many of the most changed tensors; 0 for all.")] = TOP,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints: norms, the largest change and where it is, NaNs and infinities.

    Ends with 0 where they are the same bit by bit, with 1 where they are not. Tensors that became NaN come first,
    then those of models by how much they changed, then those of optimizers.
    """
    from ftrain.checkpoint.tools.compare import compare
    from ftrain.checkpoint.tools.opening import matching, open_reference

    sources = open_reference(before), open_reference(after)
    keys = [matching(source.tensors, only) for source in sources]
    found = compare(*sources, *keys)
    if as_json:
        output.dump(_as_json(before, after, found))
    else:
        _show(before, after, found, top)
    if not found.is_same:
        raise typer.Exit(DIFFERENT)


def _show(before: str, after: str, found: Comparison, top: int) -> None:
    changed = [change for change in found.changes if not change.is_same]
    same = len(found.changes) - len(changed)
    sick = sum(change.became_sick for change in changed)
    output.say(f"{before} → {after}: {len(changed)} tensors differ, {same} are the same bit by bit")
    if sick:
        output.say(f"{sick} of them have NaNs or infinities that they did not have before", "bold red")
    shown = changed[: top or None]
    if shown:
        table = output.table(
            "tensor", "norm before", "after", "change", "relative", "largest", "at", "NaN, Inf",
            right=["norm before", "after", "change", "relative", "largest"],
        )  # fmt: skip
        for change in shown:
            table.add_row(*_row(change))
        output.console().print(table)
    if len(changed) > len(shown):
        output.say(f"… and {len(changed) - len(shown)} more (--top 0 shows all)")
    _list("only in the first", found.only_before)
    _list("only in the second", found.only_after)
    _list("of another shape", [f"{key} {list(one)} → {list(other)}" for key, one, other in found.reshaped])


def _row(change: Change) -> list[str | Text]:
    style = "red" if change.became_sick else ""
    no_figures = change.after.nans + change.after.infs == change.after.elements  # there is nothing finite to compare
    dtype = f" ({change.dtypes[0]} → {change.dtypes[1]})" if change.dtypes[0] != change.dtypes[1] else ""
    return [
        Text(change.key + dtype, style),
        output.number(change.before.norm),
        output.number(change.after.norm),
        "-" if no_figures else output.number(change.norm),
        "-" if no_figures else f"{change.relative:.2%}" if change.relative < 10 else output.number(change.relative),
        "-" if no_figures else output.number(change.max_change),
        Text(str(list(change.max_at)) if change.max_at else ""),
        Text(_sickness(change), style),
    ]


def _sickness(change: Change) -> str:
    def of(statistics: Statistics) -> str:
        counts = [(statistics.nans, "NaN"), (statistics.infs, "Inf")]
        return ", ".join(f"{count:,} {name}" for count, name in counts if count) or "none"

    if change.before.is_finite and change.after.is_finite:
        return ""
    first = f", first at {list(change.sick_at)}" if change.sick_at else ""
    return f"{of(change.before)} → {of(change.after)} of {change.after.elements:,}{first}"


def _list(what: str, names: Any) -> None:
    if names:
        more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
        output.say(f"{what}: {', '.join(names[:_NAMED_MAX])}{more}", "yellow")


def _as_json(before: str, after: str, found: Comparison) -> dict[str, Any]:
    changes = [
        {
            **{name: value for name, value in asdict(change).items() if name not in ("squares", "before", "after")},
            "norm": change.norm,
            "relative": change.relative,
            "became_sick": change.became_sick,
            "before": output.statistics(change.before),
            "after": output.statistics(change.after),
        }
        for change in found.changes
    ]
    return {
        "before": before,
        "after": after,
        "same": found.is_same,
        "tensors": changes,
        "only_before": list(found.only_before),
        "only_after": list(found.only_after),
        "reshaped": [{"key": key, "before": one, "after": other} for key, one, other in found.reshaped],
    }

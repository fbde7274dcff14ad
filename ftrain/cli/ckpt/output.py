"""How `ftrain ckpt` speaks: tables for people, JSON for scripts, numbers as people read them."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ftrain.checkpoint.tools.statistics import Statistics

AsJson = Annotated[bool, typer.Option("--json", help="For scripts: one JSON document on standard output.")]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="PATTERN", help="Only tensors with such keys: 'model.layers.*'; repeatable."),
]

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_PLAIN_WIDTH = 1000  # of lines that no terminal wraps


def console() -> Console:
    """Colours and the terminal's width on a terminal; plain lines, never wrapped, elsewhere."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return Console(width=width, highlight=False, soft_wrap=False)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns of `right` are aligned there. Only the last column may be cut into lines."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column != columns[-1])
    return made


def say(text: str = "", style: str = "") -> None:
    """One line, taken as it is."""
    console().print(Text(text, style=style))


def dump(value: Any) -> None:
    """NaN and infinities, which JSON lacks, are their names."""
    print(json.dumps(_jsonable(value), indent=2))


def size(nbytes: float) -> str:
    """1.5 GB."""
    place = 0
    while abs(nbytes) >= 999.5 and place < len(_UNITS) - 1:
        nbytes, place = nbytes / 1000, place + 1
    return f"{nbytes:.0f} {_UNITS[place]}" if place == 0 else f"{nbytes:.3g} {_UNITS[place]}"


def age(unix_seconds: float | None) -> str:
    """5 min, or - where it is not known."""
    if unix_seconds is None:
        return "-"
    passed = max(0.0, time.time() - unix_seconds)
    for seconds, name in _AGES:
        if passed >= 2 * seconds or name == "s":
            return f"{passed / seconds:.0f} {name}"
    return "-"


def count(number: int) -> str:
    """1,234."""
    return f"{number:,}"


def number(value: float) -> str:
    """0.001234."""
    return f"{value:.4g}"


def statistics(found: Statistics) -> dict[str, Any]:
    """For JSON."""
    return {
        "elements": found.elements,
        "nans": found.nans,
        "infs": found.infs,
        "zeros": found.zeros,
        "norm": found.norm,
        "mean": found.mean,
        "max_abs": found.max_abs,
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    if isinstance(value, bytes):
        return value.hex()
    return value

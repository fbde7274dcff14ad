"""The control page's own rule: each of its fields is written, by one side only."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from ftrain.core.page import Field

PACKAGE = Path(__file__).parents[2] / "ftrain"


def writers() -> dict[str, set[str]]:
    """Field name -> the parts of ftrain that store to it or add to it."""
    found: dict[str, set[str]] = defaultdict(set)
    for part in ("worker", "agent"):
        for path in (PACKAGE / part).glob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args:
                    word = ast.unparse(call.args[0])
                    if call.func.attr in ("store", "add") and word.startswith("Field."):
                        found[word.removeprefix("Field.")].add(part)
    return found


def test_field_of_the_page_has_exactly_one_writer() -> None:
    known = writers()
    known["STEP"].discard("agent")  # it sets the page up, before there is a worker
    for field in Field:
        assert known[field.name] == {"worker" if field < Field.ARMED else "agent"}, field.name

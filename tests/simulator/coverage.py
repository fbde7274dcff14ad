"""Counts which entries of the commit protocol's table the schedules reach."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

from ftrain.core import commit


class _Counting(dict[Any, Any]):
    reached: Counter[tuple[str, str]]

    def get(self, key: Any, default: Any = None) -> Any:
        self.reached[key[0].value, key[1].__name__] += 1
        return super().get(key, default)


class Coverage:
    """While entered, `reached` counts (stage, event)."""

    def __init__(self) -> None:
        self.reached: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Self:
        self._table = commit.TABLE
        counting = _Counting(commit.TABLE)
        counting.reached = self.reached
        commit.TABLE = counting
        return self

    def __exit__(self, *_: object) -> None:
        commit.TABLE = self._table

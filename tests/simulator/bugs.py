"""Bugs to plant: each is a mistake that one could make in the core or in a shell. None of them is in ftrain/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulator.world import World

Prepare = Callable[["World"], None]
BUGS: dict[str, Any] = {}


@contextmanager
def planted(name: str) -> Iterator[Prepare | None]:
    """With this bug in place; restores everything afterwards. What is yielded prepares each world."""
    if not name:
        yield None
        return
    raise NotImplementedError

"""The plain data of objects in a checkpoint, found by their names of here, with whichever rank has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftrain.checkpoint.state.source import Held
from ftrain.checkpoint.state.terms import Terms


@dataclass(frozen=True, slots=True)
class Found:
    """What `rank` said of an object that it had under `name`."""

    rank: int
    name: str
    plain: Any


class Plains:
    """Of a checkpoint, for the rank that takes what was rank `source`'s; others are asked for what that has not."""

    def __init__(self, checkpoint: Held, source: int, terms: Terms) -> None:
        self._checkpoint = checkpoint
        self._source = source
        self._terms = terms
        tracked = checkpoint.plain(source).get("tracked")
        self._known: list[tuple[int, Mapping[str, Any]]] = [(source, tracked if isinstance(tracked, dict) else {})]
        self._rest = iter(checkpoint.others(source))

    def find(self, name: str) -> Found | None:
        """The object, as this rank had it or else the first other rank that did."""
        return next(self._all(name), None)

    def others(self, name: str) -> Iterator[Any]:
        """What ranks besides the one that was found say of the same object."""
        found = self._all(name)
        next(found, None)
        return (one.plain for one in found)

    def has_tensors(self, name: str) -> bool:
        """Whether there are tensors under a name, whatever else is not."""
        return not name or any(key.startswith(f"{name}.") for key in self._checkpoint.tensors)

    def nothing(self, name: str) -> str:
        """What to say where there is nothing under a name."""
        named = f"tracked as {name!r}" if name else "that is no object's or dict's"
        there = {self._here(one) for _, tracked in self._ranks() for one in tracked}
        return f"the checkpoint has nothing {named}: it has {', '.join(sorted(there))}"

    def _all(self, name: str) -> Iterator[Found]:
        for rank, tracked in self._ranks():
            for saved, plain in tracked.items():
                if self._here(saved) == name:
                    yield Found(rank, saved, plain)

    def _here(self, saved: str) -> str:
        return self._terms.here(saved) if saved else saved

    def _ranks(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Ranks and what they tracked, each asked once."""
        number = 0
        while True:
            if number == len(self._known):
                rank, plain = next(self._rest, (-1, {}))
                tracked = plain.get("tracked")
                if rank < 0:
                    return
                self._known.append((rank, tracked if isinstance(tracked, dict) else {}))
            yield self._known[number]
            number += 1

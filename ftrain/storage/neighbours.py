"""The ranks of this node, as launchers tell each of them: what several of them read should leave the disk once."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Neighbours:
    """`ranks` on this node, of which this process is number `rank`. A process that was told nothing is alone."""

    ranks: int = 1
    rank: int = 0

    @classmethod
    def of_environment(cls) -> Neighbours:
        """By LOCAL_WORLD_SIZE and LOCAL_RANK."""
        told = os.environ.get("LOCAL_WORLD_SIZE", ""), os.environ.get("LOCAL_RANK", "")
        if not all(one.isascii() and one.isdigit() for one in told):
            return cls()
        ranks, rank = map(int, told)
        return cls(ranks, rank) if rank < ranks else cls()

    def read_twice(self, wanted_bytes: int, there_bytes: int) -> bool:
        """Whether something would be read more than once, if all of them want as much as this one of what is there."""
        return self.ranks > 1 and self.ranks * wanted_bytes > there_bytes

    def share(self, nbytes: int) -> tuple[int, int]:
        """(offset, bytes) of this rank's part of what all of them read."""
        begin, end = nbytes * self.rank // self.ranks, nbytes * (self.rank + 1) // self.ranks
        return begin, end - begin

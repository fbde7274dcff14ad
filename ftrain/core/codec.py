"""Which compression a pack may have: a short list of what zarr reads by itself, each with a level."""

from __future__ import annotations

from typing import Self

import msgspec

# Lowest and highest level, and that of one who names none. In blosc the bits of elements are shuffled first.
LEVELS = {"zstd": (1, 22, 3), "blosc-zstd": (1, 9, 3), "blosc-lz4": (1, 9, 5)}
_ALSO = {"lz4": "blosc-lz4"}  # which zarr has in blosc alone


class Codec(msgspec.Struct, frozen=True):
    """`NAME:LEVEL`. Any level is decoded alike."""

    name: str
    level: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`NAME` or `NAME:LEVEL`. Raises ValueError with what there is."""
        name, colon, said = text.partition(":")
        name = _ALSO.get(name, name)
        if name not in LEVELS:
            raise ValueError(f"there are {', '.join(LEVELS)}, each also with a level, as in zstd:9")
        low, high, usual = LEVELS[name]
        if not colon:
            return cls(name, usual)
        if not (said.isascii() and said.isdigit() and len(said) <= 2 and low <= int(said) <= high):
            raise ValueError(f"the levels of {name} go from {low} to {high}")
        return cls(name, int(said))

    def __str__(self) -> str:
        return f"{self.name}:{self.level}"

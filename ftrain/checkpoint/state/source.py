"""Where state is read from: the seam between `load` and whatever holds tensors.

To let `ftrain.load` read another format (safetensors, torch's files, DCP), implement `TensorSource`: which tensors
there are, and boxes of them into memory. `load.open_source` asks for one where a path holds nothing of ftrain's, and
`bare.Bare` makes of it what `Tracked` restores from. Renaming, choosing, casting, sharding and the report are done by
`load` for every source alike: a source hands out bits as they were saved, under the keys that they were saved under.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec
import torch

from ftrain.checkpoint.state.items import TensorItem
from ftrain.core.layout import Box


class TensorInfo(msgspec.Struct, frozen=True, gc=False):
    """A tensor in a checkpoint: its global shape, and its dtype as in `torch.<dtype>`."""

    dtype: str
    shape: tuple[int, ...]
    private: bool = False  # it belongs to one rank alone


class Wanted(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One box to be read. `into` has the box's shape and the tensor's dtype, on any device, with any strides."""

    key: str
    box: Box
    into: torch.Tensor


class TensorSource(Protocol):
    """Tensors by key, in whatever format they lie. `Checkpoint` is one, too.

    Any rank opens its own, and reads what it needs of it; the ranks do not talk to each other here.
    """

    @property
    def url(self) -> str:
        """Where it is, for messages."""
        ...

    @property
    def step(self) -> int:
        """The number of steps that were done when it was saved; 0 where the format does not say."""
        ...

    @property
    def names(self) -> Collection[str] | None:
        """The names that keys begin with, as in a state of several objects; None where keys are those of one object."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What there is, by key."""
        ...

    def read(self, wanted: Sequence[Wanted]) -> None:
        """Fill every `into`. Keys are there and boxes are within their tensors: the caller has looked.

        Raises `CorruptCheckpoint` naming tensor, file and offset where bytes are damaged or missing.
        """
        ...


class Held(Protocol):
    """Somebody who holds a state: what `Tracked` restores from, whatever its tier. Docs: `Checkpoint`."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def private_tensors(self, rank: int) -> Mapping[str, TensorInfo] | None:
        """None where this holder has nothing that is the rank's alone, which then stays as it is."""
        ...

    def plain(self, rank: int) -> Mapping[str, object]: ...

    def others(self, rank: int) -> Iterable[tuple[int, Mapping[str, object]]]:
        """Other ranks and their plain data, where it may differ from this one's: stages of a pipeline."""
        ...

    def read_into(self, items: Sequence[TensorItem], rank: int, *, elsewhere: Collection[str] = ()) -> None: ...

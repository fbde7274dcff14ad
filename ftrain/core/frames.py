"""How a box is cut into frames: runs of its bytes, each compressed by itself, each a chunk of a zarr array.

A frame is a block of the box that is one run in C order: `(1, …, height, inner dimensions whole)`. Frames follow each
other in C order; where the height does not divide the box, what is missing to the last one is zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated

import msgspec

FRAME_BYTES_MAX = 4 << 20  # of what is compressed at a time, and of what any reader has to hold
PLAIN_BYTES_MAX = 4096  # a tensor of no more than a page is stored as it is: its page would not become smaller
CUTS_FACTOR = 4  # how many times more frames than needed an even cut may have

_Count = Annotated[int, msgspec.Meta(ge=0)]


class Frames(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A box as it is stored: frames back to back, of `nbytes` each, from the box's offset on."""

    shape: tuple[_Count, ...]  # of each frame, in elements
    nbytes: tuple[_Count, ...]
    crc32c: tuple[Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)], ...]  # of the bytes that are stored

    @property
    def stored_bytes(self) -> int:
        return sum(self.nbytes)


@dataclass(frozen=True, slots=True)
class Cut:
    """A box of `outer` times `rows` rows of `inner` elements, cut every `height` rows."""

    outer: int
    rows: int
    height: int
    inner: int

    @classmethod
    def of(cls, box_shape: tuple[int, ...], frame: tuple[int, ...]) -> Cut:
        """`frame` is the shape of a block of the box that is one run."""
        dim = _dimension(box_shape, frame)
        return cls(prod(box_shape[:dim]), box_shape[dim], frame[dim], prod(box_shape[dim + 1 :]))

    @property
    def count(self) -> int:
        """Of frames."""
        return self.outer * self._each

    @property
    def elements(self) -> int:
        """Of a frame, the zeros at its end included."""
        return self.height * self.inner

    def run(self, number: int) -> tuple[int, int]:
        """(first element, elements) of the box that are in this frame."""
        outer, inside = divmod(number, self._each)
        first = inside * self.height
        return (outer * self.rows + first) * self.inner, min(self.height, self.rows - first) * self.inner

    def covering(self, begin: int, end: int) -> range:
        """The frames that hold the elements from `begin` up to `end`; there is at least one."""
        return range(self._holding(begin), self._holding(end - 1) + 1)

    def _holding(self, element: int) -> int:
        outer, inside = divmod(element, self.rows * self.inner)
        return outer * self._each + inside // self.elements

    @property
    def _each(self) -> int:
        return -(-self.rows // self.height)


def is_cut(shape: tuple[int, ...], item_bytes: int, nbytes: int) -> bool:
    """Whether a box of `nbytes` of a tensor of this shape is stored in frames. All boxes of a tensor are, or none."""
    return nbytes > 0 and prod(shape) * item_bytes > PLAIN_BYTES_MAX


def frame_shape(
    shape: tuple[int, ...], box_offset: tuple[int, ...], box_shape: tuple[int, ...], item_bytes: int, world_size: int
) -> tuple[int, ...]:
    """The shape of the frames of a box of a tensor of `shape`.

    Each rank chooses for its own box, and knows no other. Where a tensor is cut evenly, or as `torch.chunk` cuts it,
    among all ranks or groups of them, all choose alike: then the frames of all are one regular grid.
    """
    row, dim = item_bytes, len(box_shape) - 1
    while dim > 0 and row * box_shape[dim] <= FRAME_BYTES_MAX:
        row *= box_shape[dim]
        dim -= 1
    is_alone = box_shape[dim] == shape[dim]
    pitch = _pitch(shape[dim], box_offset[dim], box_shape[dim], world_size)
    height = _height(pitch, FRAME_BYTES_MAX // row, is_alone)
    return (1,) * dim + (height,) + box_shape[dim + 1 :]


def stored_bytes_max(nbytes: int) -> int:
    """What no codec makes of so many bytes, however little they can be compressed."""
    return nbytes + nbytes // 64 + 4096


def problem(frames: Frames, box_shape: tuple[int, ...], item_bytes: int) -> str:
    """Why these cannot be the frames of a box; empty when they can. Nothing of them is taken into memory before."""
    shape = frames.shape
    if not shape or len(shape) != len(box_shape) or 0 in box_shape:
        return "has frames that do not fit its shape"
    dim = _dimension(box_shape, shape)
    if any(size != 1 for size in shape[:dim]) or shape[dim] < 1:
        return "has frames that are no runs of its bytes"
    nbytes = prod(shape) * item_bytes
    if nbytes > FRAME_BYTES_MAX:
        return f"has frames of {nbytes} bytes, over the limit of {FRAME_BYTES_MAX}"
    count = Cut.of(box_shape, shape).count
    if not len(frames.nbytes) == len(frames.crc32c) == count:
        return f"has {len(frames.nbytes)} frames and {len(frames.crc32c)} checksums of frames instead of {count}"
    if not 0 < min(frames.nbytes) <= max(frames.nbytes) <= stored_bytes_max(nbytes):
        return f"has a frame of no or too many bytes, where {nbytes} are compressed"
    return ""


def _dimension(box_shape: tuple[int, ...], frame: tuple[int, ...]) -> int:
    """The dimension along which the box is cut: behind it the frame is as the box."""
    dim = len(box_shape) - 1
    while dim > 0 and box_shape[dim] == frame[dim]:
        dim -= 1
    return dim


def _pitch(total: int, offset: int, count: int, world_size: int) -> int:
    """How many rows the shards have among which this one is, which begins at `offset`: its own, unless it is the last.

    The last one of `torch.chunk` may be shorter; which number of shards makes it begin there tells the others' height.
    """
    for shards in range(world_size, 1, -1):
        pitch = -(-total // shards)
        is_one = pitch == count or (pitch > count and offset + count == total)
        if world_size % shards == 0 and is_one and offset % pitch == 0:
            return pitch
    return count


def _height(pitch: int, rows_max: int, is_alone: bool) -> int:
    """Rows of a frame: as many as may be, but so that shards of this pitch are whole frames, if that can be had."""
    cuts = -(-pitch // rows_max)
    even = range(cuts, cuts + 1) if is_alone else range(cuts, min(CUTS_FACTOR * cuts, pitch) + 1)
    return next((pitch // number for number in even if pitch % number == 0), -(-pitch // cuts))

"""Compressed boxes, read and decoded for nothing but the proof. Needs no torch."""

from __future__ import annotations

from math import prod

import numpy as np

from ftrain.checkpoint.compression import decode
from ftrain.checkpoint.written import Written
from ftrain.core.codec import Codec
from ftrain.core.layout import ITEM_BYTES
from ftrain.errors import CorruptCheckpoint
from ftrain.storage.base import Ranges, Storage


def check_frames(storage: Storage, pack: Written) -> None:
    """All compressed boxes become what the index says, frame by frame."""
    for box, frames in zip(pack.index.boxes, pack.index.frames_of_boxes, strict=True):
        if frames is None:
            continue
        offset, codec = box.offset, Codec.parse(pack.index.codec)
        whole = np.empty(prod(frames.shape) * ITEM_BYTES[box.dtype], np.uint8)
        for nbytes, crc32c in zip(frames.nbytes, frames.crc32c, strict=True):
            stored, ranges = np.empty(nbytes, np.uint8), Ranges([pack.file])
            ranges.add(0, crc32c, offset, nbytes, stored.ctypes.data)
            if storage.read_ranges(ranges):
                raise pack.damaged(storage, box.key, offset, nbytes)
            try:
                decode(codec, stored, whole)
            except CorruptCheckpoint as error:
                raise pack.damaged(storage, box.key, offset, nbytes, str(error)) from None
            offset += nbytes

"""Frames through numcodecs, which is what zarr uses: encoding, and decoding what a stranger may have written.

A frame says itself what it becomes, so its first bytes are looked at before the library is: it has to become exactly
what the index says, by the codec that the index names. Sources: RFC 8878 (Zstandard), 3.1.1.1; c-blosc's
README_CHUNK_FORMAT.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrain.core.codec import Codec
from ftrain.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOSC = struct.Struct("<BBBBIII")  # version, version of what is inside, flags, bytes of an element, and three lengths
_BLOSC_INSIDE = {"blosc-lz4": 1, "blosc-zstd": 4}  # the highest three bits of the flags
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # of which the bits are shuffled


def encode(codec: Codec, address: int, nbytes: int, frame_bytes: int, item_bytes: int) -> bytes:
    """The frame of `nbytes` at `address`, with zeros behind them up to `frame_bytes`."""
    data = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))
    if nbytes < frame_bytes:
        data = np.concatenate((data, np.zeros(frame_bytes - nbytes, np.uint8)))
    return bytes(_library(codec).encode(data.view(_WORDS[item_bytes])))


def decode(codec: Codec, stored: NDArray[np.uint8], into: NDArray[np.uint8]) -> None:
    """Fill `into` from one frame. Raises `CorruptCheckpoint` where it does not become just that.

    Only what is wrong is said, as the end of a sentence: the caller knows of whose bytes.
    """
    declared = _declared(codec, bytes(stored[: _BLOSC.size]), len(stored))
    if declared < 0:
        raise CorruptCheckpoint("are no frame of their codec")
    if declared != len(into):
        raise CorruptCheckpoint(f"say that they become {declared} bytes instead of {len(into)}")
    try:
        _library(codec).decode(stored, into)
    except (RuntimeError, ValueError) as error:
        raise CorruptCheckpoint(f"cannot be decoded ({error})") from None


def _declared(codec: Codec, head: bytes, nbytes: int) -> int:
    """What a frame of `nbytes` says that it becomes; -1 where it says nothing, or is none of this codec."""
    if codec.name == "zstd":
        return _declared_zstd(head)
    if len(head) < _BLOSC.size:
        return -1
    _, _, flags, _, decoded, block, stored = _BLOSC.unpack(head)
    is_sound = flags >> 5 == _BLOSC_INSIDE[codec.name] and stored == nbytes and 0 < block <= decoded
    return int(decoded) if is_sound else -1


def _declared_zstd(head: bytes) -> int:
    if len(head) < 5 or head[:4] != _ZSTD_MAGIC:
        return -1
    flag, is_single, dictionary = head[4] >> 6, head[4] >> 5 & 1, head[4] & 3
    begin = 5 + (1 - is_single) + (0, 1, 2, 4)[dictionary]
    size = (is_single, 2, 4, 8)[flag]
    if not size or len(head) < begin + size:
        return -1
    return int.from_bytes(head[begin : begin + size], "little") + (256 if size == 2 else 0)


@cache
def _library(codec: Codec) -> Any:
    import numcodecs  # type: ignore[import-untyped]  # takes its time: only who needs it waits for it

    if codec.name == "zstd":
        return numcodecs.Zstd(level=codec.level)
    return numcodecs.Blosc(
        cname=codec.name.removeprefix("blosc-"), clevel=codec.level, shuffle=numcodecs.Blosc.BITSHUFFLE
    )

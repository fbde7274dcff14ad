"""CRC-32C against the standard's vectors and other implementations. cpp/crc32c_test.cpp compares it with the tables."""

from __future__ import annotations

import ctypes
import random

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.checksum32 import CRC32C

from ftrain._native import crc32c, crc32c_address, crc32c_backend

ISCSI_READ_10 = bytes.fromhex(
    "01c00000000000000000000000000000" + "14000000000004000000001400000018" + "28000000000000000200000000000000"
)
RFC_3720_B4 = [  # the RFC prints the bytes of each checksum lowest first
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (ISCSI_READ_10, 0xD9963A56),
]
# Around the lanes that the instruction is fed in: words of 8, blocks of 3 x 256 and of 3 x 8192.
SIZES = sorted(
    {max(0, edge + d) for edge in (0, 8, 16, 768, 1536, 24576, 24576 + 768, 49152) for d in (-9, -1, 0, 1, 7)}
)


def test_backend_is_named() -> None:
    assert crc32c_backend() in ("sse4.2", "armv8", "software")


@pytest.mark.parametrize(("data", "expected"), RFC_3720_B4)
def test_rfc_3720_vectors_give_the_published_sums(data: bytes, expected: int) -> None:
    assert crc32c(data, 0) == expected


def test_check_string_gives_the_catalogued_sum() -> None:
    assert crc32c(b"123456789", 0) == 0xE3069283
    assert crc32c(b"", 0) == 0


@pytest.mark.parametrize("nbytes", SIZES)
def test_sizes_around_lane_edges_agree_with_google_crc32c(nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    assert crc32c(data, 0) == google_crc32c.value(data)


@given(data=st.binary(max_size=4096), start=st.integers(0, 15), cut=st.integers(0, 4096))
def test_any_cut_at_any_alignment_continues(data: bytes, start: int, cut: int) -> None:
    view = memoryview(bytes(start) + data)[start:]
    assert crc32c(view[cut:], crc32c(view[:cut], 0)) == google_crc32c.value(data)  # type: ignore[arg-type]


def test_numcodecs_agrees_on_where_zarr_puts_the_sum() -> None:
    data = np.arange(100_000, dtype=np.uint8)
    encoded = bytes(CRC32C(location="end").encode(data))
    assert encoded[-4:] == crc32c(data).to_bytes(4, "little")


def test_address_agrees_with_the_buffer() -> None:
    data = random.Random(7).randbytes(100_001)
    memory = ctypes.create_string_buffer(data, len(data))
    address = ctypes.addressof(memory)
    assert crc32c_address(address, len(data)) == crc32c(data)
    assert crc32c_address(address + 10, 90, crc32c(data[:10])) == crc32c(data[:100])


def test_wrong_arguments_raise_and_name_the_fault() -> None:
    with pytest.raises(ValueError, match="null address"):
        crc32c_address(0, 8)
    with pytest.raises(TypeError):
        crc32c("text")  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        crc32c(memoryview(bytes(64))[::2])

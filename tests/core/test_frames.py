"""Cutting boxes into frames, and naming codecs."""

from __future__ import annotations

from itertools import accumulate
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrain.core import frames
from ftrain.core.codec import LEVELS, Codec
from ftrain.core.frames import FRAME_BYTES_MAX, Cut, Frames, frame_shape, is_cut

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("zstd", "zstd:3"), ("zstd:22", "zstd:22"), ("blosc-zstd", "blosc-zstd:3"), ("lz4", "blosc-lz4:5")],
)
def test_codec_is_named_with_its_level(text: str, canonical: str) -> None:
    assert str(Codec.parse(text)) == canonical
    assert Codec.parse(canonical) == Codec.parse(text)


@pytest.mark.parametrize(
    "text", ["", "gzip", "ZSTD", "zstd:", "zstd:0", "zstd:23", "zstd:-1", "zstd:³", "zstd:1:2", "blosc", "blosc-lz4:10"]
)
def test_codec_that_is_not_in_the_list_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(ValueError, match=r"there are zstd, blosc-zstd, blosc-lz4|the levels of"):
        Codec.parse(text)


def test_every_codec_is_its_own_name() -> None:
    for name, (low, high, usual) in LEVELS.items():
        assert low <= usual <= high
        assert str(Codec.parse(f"{name}:{high}")) == f"{name}:{high}"


@given(st.data())
def test_frames_are_the_box_each_element_once_and_in_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    frame = (1,) * dim + (data.draw(st.integers(1, 14)),) + shape[dim + 1 :]
    cut = Cut.of(shape, frame)
    runs = [cut.run(number) for number in range(cut.count)]
    assert [begin for begin, _ in runs] == [0, *accumulate(count for _, count in runs)][:-1]
    assert sum(count for _, count in runs) == prod(shape)
    assert max(count for _, count in runs) <= cut.elements == prod(frame)
    begin = data.draw(st.integers(0, prod(shape) - 1))
    end = data.draw(st.integers(begin + 1, prod(shape)))
    expected = [number for number, (at, count) in enumerate(runs) if at < end and at + count > begin]
    assert list(cut.covering(begin, end)) == expected


@given(st.data())
def test_every_choice_of_frames_is_one_that_a_reader_takes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 7, 1000, 50257, 3 * MIB]), min_size=1, max_size=3)))
    box = tuple(data.draw(st.integers(1, size)) for size in shape)
    offset = tuple(data.draw(st.integers(0, size - count)) for size, count in zip(shape, box, strict=True))
    item = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    chosen = frame_shape(shape, offset, box, item, data.draw(st.integers(1, 64)))
    assert prod(chosen) * item <= FRAME_BYTES_MAX
    count = Cut.of(box, chosen).count
    if count < 1000:
        assert frames.problem(Frames(chosen, (1,) * count, (0,) * count), box, item) == ""


@pytest.mark.parametrize("rows", [8, 10, 4096, 50257, 50304, 128_256])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_shards_of_torch_chunk_choose_one_grid_where_they_can(rows: int, ranks: int) -> None:
    width, pitch = 1024, -(-rows // ranks)
    shards = [(at, min(pitch, rows - at)) for at in range(0, rows, pitch)]
    chosen = {frame_shape((rows, width), (at, 0), (count, width), 4, ranks) for at, count in shards}
    assert len(chosen) == 1
    height = chosen.pop()[0]
    assert 0 < height * width * 4 <= FRAME_BYTES_MAX
    assert pitch % height == 0 or len(shards) == 1 or pitch > FRAME_BYTES_MAX // (width * 4)


def test_large_tensor_that_is_alone_is_cut_evenly_with_little_filling() -> None:
    (height, _) = frame_shape((50257, 768), (0, 0), (50257, 768), 4, 8)
    cuts = -(-50257 // height)
    assert cuts == -(-50257 * 768 * 4 // FRAME_BYTES_MAX)
    assert cuts * height - 50257 < cuts


def test_row_that_is_larger_than_a_frame_is_cut_within() -> None:
    assert frame_shape((2, 3 * MIB), (0, 0), (2, 3 * MIB), 4, 1) == (1, MIB)


def test_what_is_no_more_than_a_page_is_left_as_it_is() -> None:
    assert not is_cut((1024,), 4, 4096)
    assert is_cut((1025,), 4, 4100)
    assert is_cut((1025,), 4, 40)  # one of its shards, as the others
    assert not is_cut((2048,), 4, 0)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Frames((), (), ()), "do not fit"),
        (Frames((3,), (5, 5), (0, 0)), "do not fit"),
        (Frames((2, 2), (5,) * 4, (0,) * 4), "no runs"),
        (Frames((0, 3), (5,), (0,)), "no runs"),
        (Frames((1 << 40, 3), (5,), (0,)), "over the limit"),
        (Frames((2, 3), (5,), (0,)), "instead of 2"),
        (Frames((2, 3), (5, 5), (0,)), "instead of 2"),
        (Frames((2, 3), (5, 0), (0, 0)), "no or too many"),
        (Frames((2, 3), (5, 1 << 20), (0, 0)), "no or too many"),
    ],
)
def test_frames_that_no_writer_makes_are_refused(made: Frames, said: str) -> None:
    assert said in frames.problem(made, (4, 3), 4)

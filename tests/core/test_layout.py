from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ftrain.core.layout import (
    ALIGNMENT_BYTES,
    CHUNK_BYTES_MAX,
    Box,
    Entry,
    Mesh,
    Shard,
    TensorSpec,
    local_shard,
    read_plan,
    shard_index_bytes,
    split,
    strides,
    uncovered,
    whole,
)
from ftrain.core.placement import local_runs, sharded
from ftrain.core.write_plan import WriteItem, slot_layout, write_plan
from ftrain.errors import CorruptCheckpoint, MismatchedState, UnsupportedTensor

Placed = tuple[tuple[int, ...], Mesh, tuple[str, ...], Mesh, tuple[str, ...]]


@st.composite
def meshes(draw: st.DrawFn, dimensions: int) -> tuple[Mesh, tuple[str, ...]]:
    """A mesh of up to 16 ranks in any order, with placements for a tensor of so many dimensions: strided ones, too."""
    shape: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        shape.append(draw(st.integers(1, min(8, 16 // prod(shape)))))
    ranks = draw(st.permutations(range(prod(shape))))
    choices = ["R", *(sharded(dim, factor) for dim in range(dimensions) for factor in (1, 2, 3))]
    placements = [draw(st.sampled_from(choices)) for _ in shape]
    if dimensions and len(shape) > 1 and draw(st.booleans()):
        placements[-2:] = [sharded(0, shape[-1]), sharded(0)]  # as fully_shard places what tensor parallelism cut
    return Mesh(tuple(shape), tuple(ranks)), tuple(placements)


@st.composite
def placed(draw: st.DrawFn) -> Placed:
    """A shape, and two ways to place it."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    return (shape, *draw(meshes(len(shape))), *draw(meshes(len(shape))))


def shard_of(spec: TensorSpec, rank: int) -> Shard:
    shard = local_shard(spec, rank)
    assert shard is not None
    return shard


def part_of(tensor: np.ndarray, box: Box) -> np.ndarray:
    return tensor[(..., *(slice(at, at + count) for at, count in zip(box.offset, box.shape, strict=True)))]


@settings(deadline=None)
@given(placed())
def test_written_boxes_are_the_tensor_exactly_once_and_their_writer_holds_them(case: Placed) -> None:
    shape, mesh, placements, _, _ = case
    spec = TensorSpec("w", "float32", shape, mesh, placements)
    plan = write_plan([[spec]] * len(mesh.ranks))
    boxes = [item.box for items in plan for item in items]
    assert uncovered(shape, boxes) == ""
    count = np.zeros(shape, dtype=int)
    for rank, items in enumerate(plan):
        for item in items:
            part_of(count, item.box)[...] += 1
            assert item.nbytes == 4 * item.box.volume
            assert prod(shape) == 0 or item.box in shard_of(spec, rank).boxes
    assert (count == 1).all()
    if prod(shape) == 0:
        assert len(boxes) == 1  # that there is such a tensor is worth a record


@settings(max_examples=200, deadline=None)
@given(placed(), st.sampled_from([1, 40, 1 << 20]))
def test_what_one_mesh_saved_another_reads_bit_for_bit(case: Placed, nbytes_max: int) -> None:
    shape, saved_mesh, saved_placements, mesh, placements = case
    tensor = np.arange(prod(shape), dtype=np.int32).reshape(shape)
    saved = TensorSpec("w", "int32", shape, saved_mesh, saved_placements)
    packs: list[bytes] = []
    entries: list[Entry] = []
    for rank, items in enumerate(write_plan([[saved]] * len(saved_mesh.ranks))):
        layout = slot_layout(items)
        pack = bytearray(layout.payload_bytes)
        for item, offset in zip(items, layout.offsets, strict=True):
            pack[offset : offset + item.nbytes] = part_of(tensor, item.box).tobytes()
            entries.append(Entry("w", item.box, rank, offset, item.nbytes, 0))
        packs.append(bytes(pack))
    spec = TensorSpec("w", "int32", shape, mesh, placements)
    for rank in range(len(mesh.ranks)):
        shard = shard_of(spec, rank)
        local, expected = np.full(shard.shape, -1, np.int32), np.full(shard.shape, -2, np.int32)
        fetched = 0
        for piece in read_plan([("w", box) for box in shard.boxes], entries):
            box, offset = shard.boxes[piece.wanted], shard.offsets[piece.wanted]
            fetched += piece.box.volume
            for part in split(piece, nbytes_max):
                assert part.nbytes <= nbytes_max or part.box.volume == 1
                run = np.frombuffer(packs[part.entry.pack], np.int32, part.nbytes // 4, part.offset)
                steps = tuple(4 * step for step in strides(part.entry.box))
                values = np.lib.stride_tricks.as_strided(run, part.box.shape, steps)
                inside = tuple(c + b - a for a, b, c in zip(box.offset, part.box.offset, offset, strict=True))
                part_of(local, Box(inside, part.box.shape))[...] = values
        for box, offset in zip(shard.boxes, shard.offsets, strict=True):
            part_of(expected, Box(offset, box.shape))[...] = part_of(tensor, box)
        assert (local == expected).all()
        assert fetched == prod(shard.shape)  # nothing twice, and nothing for nothing


def indexes_of(runs: list[tuple[int, int]]) -> list[int]:
    return [index for begin, count in runs for index in range(begin, begin + count)]


def chunk(indexes: list[int], parts: int, number: int) -> list[int]:
    """As torch.chunk."""
    size = -(-len(indexes) // parts)
    return indexes[number * size : (number + 1) * size] if size else []


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_strided_shards_are_of_each_part_a_share(size: int, ranks: int, factor: int, then: int, at: int) -> None:
    assume(then != factor)
    for rank in range(ranks):
        parts = [chunk(list(range(size)), factor, part) for part in range(factor)]
        mine = chunk([index for part in parts for index in chunk(part, ranks, rank)], then, at % then)
        runs = local_runs([size], [ranks, then], [rank, at % then], [sharded(0, factor), sharded(0)])
        assert indexes_of(runs[0]) == mine


@settings(deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(1, 5), min_size=2, max_size=3), st.data())
def test_fully_shard_cuts_what_is_left_of_the_mesh_dimensions_on_its_right(
    size: int, mesh: list[int], data: st.DataObject
) -> None:
    coordinate = [data.draw(st.integers(0, ranks - 1)) for ranks in mesh]
    mine = list(range(size))
    for ranks, at in [*zip(mesh[1:], coordinate[1:], strict=True), (mesh[0], coordinate[0])]:
        mine = chunk(mine, ranks, at)
    placements = [sharded(0, prod(mesh[1:])), *[sharded(0)] * (len(mesh) - 1)]
    runs = local_runs([size], mesh, coordinate, placements)
    assert indexes_of(runs[0]) == mine
    assert len(runs[0]) <= 1


def test_a_strided_shard_of_uneven_columns_is_several_boxes() -> None:
    spec = TensorSpec("w", "float32", (2, 7), Mesh((2,), (0, 1)), ("S1/2",))
    assert shard_of(spec, 0) == Shard((2, 4), (Box((0, 0), (2, 2)), Box((0, 4), (2, 2))), ((0, 0), (0, 2)))
    assert shard_of(spec, 1) == Shard((2, 3), (Box((0, 2), (2, 2)), Box((0, 6), (2, 1))), ((0, 0), (0, 2)))
    writes = write_plan([[spec], [spec]])
    assert [[(item.box, item.offset, item.nbytes) for item in items] for items in writes] == [
        [(Box((0, 0), (2, 2)), (0, 0), 16), (Box((0, 4), (2, 2)), (0, 2), 16)],
        [(Box((0, 2), (2, 2)), (0, 0), 16), (Box((0, 6), (2, 1)), (0, 2), 8)],
    ]


def boxes_of(spec: TensorSpec, rank: int) -> tuple[Box, ...] | None:
    shard = local_shard(spec, rank)
    return None if shard is None else shard.boxes


def test_shards_are_cut_as_dtensor_cuts_them() -> None:
    spec = TensorSpec("w", "float32", (5, 3), Mesh((4,), (0, 1, 2, 3)), ("S0",))
    assert [boxes_of(spec, rank) for rank in range(5)] == [
        (Box((0, 0), (2, 3)),),
        (Box((2, 0), (2, 3)),),
        (Box((4, 0), (1, 3)),),
        (),
        None,
    ]
    assert shard_of(spec, 3).shape == (0, 3)


def test_two_mesh_dimensions_cut_the_same_dimension_one_after_the_other() -> None:
    spec = TensorSpec("w", "float32", (10,), Mesh((2, 2), (0, 1, 2, 3)), ("S0", "S0"))
    assert [boxes_of(spec, rank) for rank in range(4)] == [
        (Box((0,), (3,)),),
        (Box((3,), (2,)),),
        (Box((5,), (3,)),),
        (Box((8,), (2,)),),
    ]


def test_replicated_bytes_are_shared_out_among_their_holders() -> None:
    specs = [TensorSpec(f"w{number}", "uint8", (size,)) for number, size in enumerate((100, 60, 50, 50, 40))]
    loads = [sum(item.nbytes for item in items) for items in write_plan([specs] * 3)]
    assert sorted(loads) == [100, 100, 100]


def test_ranks_with_much_of_their_own_write_less_of_what_is_shared() -> None:
    shared = TensorSpec("w", "uint8", (10,))
    own = TensorSpec("w", "uint8", (99,), private=True)
    plan = write_plan([[shared, own], [shared]])
    assert [[item.spec for item in items] for items in plan] == [[own], [shared]]


def test_the_plan_does_not_depend_on_who_makes_it() -> None:
    mesh = Mesh((2, 2), (0, 1, 2, 3))
    specs = [
        TensorSpec("a", "float32", (6, 4), mesh, ("R", "S0")),
        TensorSpec("b", "float32", (3,)),
        TensorSpec("c", "bfloat16", (8,), mesh, ("S0", "R")),
    ]
    assert write_plan([specs] * 4) == write_plan([list(specs) for _ in range(4)])


def test_replicas_of_a_sharded_group_write_each_box_once() -> None:
    left = TensorSpec("w", "float32", (4, 2), Mesh((2,), (0, 1)), ("S0",))
    right = TensorSpec("w", "float32", (4, 2), Mesh((2,), (2, 3)), ("S0",))
    plan = write_plan([[left], [left], [right], [right]])
    assert uncovered((4, 2), [item.box for items in plan for item in items]) == ""


def test_ranks_that_disagree_about_a_tensor_are_refused() -> None:
    with pytest.raises(MismatchedState, match=r"w: rank 0 has it as float32\[2\], rank 1 as float32\[3\]"):
        write_plan([[TensorSpec("w", "float32", (2,))], [TensorSpec("w", "float32", (3,))]])


def test_a_rank_that_does_not_name_its_shard_is_refused() -> None:
    spec = TensorSpec("w", "float32", (2,), Mesh((2,), (0, 1)), ("S0",))
    with pytest.raises(MismatchedState, match="w: rank 1 is in its mesh"):
        write_plan([[spec], []])


def test_an_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedTensor, match=r"w: .*quint8"):
        write_plan([[TensorSpec("w", "quint8", (2,))]])


def items_of(*sizes: int) -> list[WriteItem]:
    return [WriteItem(TensorSpec(str(size), "uint8", (size,)), whole((size,)), size) for size in sizes]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 * CHUNK_BYTES_MAX), max_size=6))
def test_an_image_is_whole_pages_of_equal_chunks_with_the_index_last(sizes: list[int]) -> None:
    layout = slot_layout(items_of(*sizes))
    assert layout.image_bytes % ALIGNMENT_BYTES == 0
    assert layout.chunk_bytes % ALIGNMENT_BYTES == 0
    assert ALIGNMENT_BYTES <= layout.chunk_bytes <= CHUNK_BYTES_MAX
    assert layout.payload_bytes == layout.chunks * layout.chunk_bytes <= layout.index_offset
    assert layout.index_offset + shard_index_bytes(layout.chunks) == layout.image_bytes
    end = 0
    for offset, size in zip(layout.offsets, sizes, strict=True):
        assert offset % ALIGNMENT_BYTES == 0
        assert offset >= end
        end = offset + size
    assert end <= layout.payload_bytes
    used = sum(-(-size // ALIGNMENT_BYTES) for size in sizes) * ALIGNMENT_BYTES
    assert layout.image_bytes <= used + (layout.chunks + 1) * ALIGNMENT_BYTES + ALIGNMENT_BYTES


def test_a_small_state_makes_a_small_file() -> None:
    assert slot_layout(items_of(1)).image_bytes == 2 * ALIGNMENT_BYTES
    assert slot_layout([]).image_bytes == 2 * ALIGNMENT_BYTES


def test_a_box_that_was_not_written_whole_is_refused_by_name() -> None:
    entries = [Entry("w", Box((0,), (4,)), 0, 0, 16, 0)]
    with pytest.raises(CorruptCheckpoint, match="w: 2 of the 4 elements at offset"):
        read_plan([("w", Box((2,), (4,)))], entries)


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box((0, 0), (2, 2))], "4 of 8 elements"),
        ([Box((0, 0), (2, 4)), Box((1, 0), (1, 1))], "9 of 8 elements"),
        ([Box((0, 0), (2, 2)), Box((0, 1), (2, 2))], "there twice"),
        ([Box((0, 0), (3, 4))], "outside"),
        ([Box((0,), (8,))], "outside"),
    ],
)
def test_boxes_that_are_not_the_tensor_are_told(boxes: list[Box], problem: str) -> None:
    assert problem in uncovered((2, 4), boxes)

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.core.layout import (
    ALIGNMENT_BYTES,
    CHUNK_BYTES_MAX,
    Box,
    Entry,
    Mesh,
    TensorSpec,
    WriteItem,
    local_box,
    read_plan,
    shard_index_bytes,
    slot_layout,
    split,
    strides,
    uncovered,
    whole,
    write_plan,
)
from ftrain.errors import CorruptCheckpoint, MismatchedState, UnsupportedTensor

Placed = tuple[tuple[int, ...], Mesh, tuple[str, ...], Mesh, tuple[str, ...]]


@st.composite
def meshes(draw: st.DrawFn, dimensions: int) -> tuple[Mesh, tuple[str, ...]]:
    """A mesh over some ranks in any order, with placements for a tensor of so many dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    ranks = draw(st.permutations(range(prod(shape))))
    choices = ["R", *(f"S{dim}" for dim in range(dimensions))]
    return Mesh(shape, tuple(ranks)), tuple(draw(st.sampled_from(choices)) for _ in shape)


@st.composite
def placed(draw: st.DrawFn) -> Placed:
    """A shape, and two ways to place it."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    return (shape, *draw(meshes(len(shape))), *draw(meshes(len(shape))))


def part_of(tensor: np.ndarray, box: Box) -> np.ndarray:
    return tensor[(..., *(slice(at, at + count) for at, count in zip(box.offset, box.shape, strict=True)))]


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
            assert prod(shape) == 0 or item.box == local_box(spec, rank)
    assert (count == 1).all()
    if prod(shape) == 0:
        assert len(boxes) == 1  # that there is such a tensor is worth a record


@settings(max_examples=200)
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
        box = local_box(spec, rank)
        assert box is not None
        local = np.full(box.shape, -1, dtype=np.int32)
        for piece in read_plan([("w", box)], entries):
            for part in split(piece, nbytes_max):
                assert part.nbytes <= nbytes_max or part.box.volume == 1
                run = np.frombuffer(packs[part.entry.pack], np.int32, part.nbytes // 4, part.offset)
                steps = tuple(4 * step for step in strides(part.entry.box))
                values = np.lib.stride_tricks.as_strided(run, part.box.shape, steps)
                inside = Box(tuple(b - a for a, b in zip(box.offset, part.box.offset, strict=True)), part.box.shape)
                part_of(local, inside)[...] = values
        assert (local == part_of(tensor, box)).all()


def test_shards_are_cut_as_dtensor_cuts_them() -> None:
    spec = TensorSpec("w", "float32", (5, 3), Mesh((4,), (0, 1, 2, 3)), ("S0",))
    assert [local_box(spec, rank) for rank in range(5)] == [
        Box((0, 0), (2, 3)),
        Box((2, 0), (2, 3)),
        Box((4, 0), (1, 3)),
        Box((5, 0), (0, 3)),
        None,
    ]


def test_two_mesh_dimensions_cut_the_same_dimension_one_after_the_other() -> None:
    spec = TensorSpec("w", "float32", (10,), Mesh((2, 2), (0, 1, 2, 3)), ("S0", "S0"))
    assert [local_box(spec, rank) for rank in range(4)] == [
        Box((0,), (3,)),
        Box((3,), (2,)),
        Box((5,), (3,)),
        Box((8,), (2,)),
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

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftrain.checkpoint.state.items import dtype_name, item_of, items_of, spec_of, torch_dtype
from ftrain.core.layout import ITEM_BYTES, Mesh, TensorSpec, local_shard
from ftrain.errors import UnsupportedTensor

RANK, SIZE = 3, 8


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Rank 3 of 8, as 4 x 2, with a group that only pretends to communicate."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=SIZE)
    yield init_device_mesh("cpu", (4, 2))
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(10, 7), (3, 2), (1, 1), (8, 4, 2)])
@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0), Replicate()),
        (Replicate(), Shard(1)),
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(-1), Replicate()),
        (Shard(0), Shard(0)),
    ],
)
def test_a_dtensors_local_part_is_the_box_that_the_layout_says(
    mesh: DeviceMesh, shape: tuple[int, ...], placements: tuple[Shard | Replicate, ...]
) -> None:
    tensor = distribute_tensor(torch.arange(float(torch.Size(shape).numel())).reshape(shape), mesh, placements)
    item = item_of("w", tensor)
    assert item.spec.mesh == Mesh((4, 2), tuple(range(SIZE)))
    shard = local_shard(item.spec, RANK)
    assert shard is not None
    assert tuple(item.local.shape) == shard.shape
    assert item.spec.shape == shape


class Strange(Placement):
    """Of another library, or of a torch to come."""


def placed_as(mesh: DeviceMesh, local: torch.Tensor, shape: tuple[int, ...], *placements: Placement) -> DTensor:
    size, stride = torch.Size(shape), torch.empty(shape).stride()
    tensor = DTensor.from_local(local, mesh, [Replicate()] * 2, run_check=False, shape=size, stride=stride)
    object.__setattr__(tensor._spec, "placements", placements)
    return tensor


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (Partial(), r"has no value yet, each rank holds a part of a sum; call \.redistribute\(\)"),
        (Partial("max"), "has no value yet"),
        (Strange(), "cannot be in a checkpoint; redistribute it"),
    ],
)
def test_a_placement_that_cannot_be_saved_is_refused_by_name(mesh: DeviceMesh, placement: Placement, said: str) -> None:
    tensor = placed_as(mesh, torch.zeros(4, 4), (4, 4), placement, Replicate())
    with pytest.raises(UnsupportedTensor, match=rf"layer\.w: a DTensor placed as .*{said}"):
        spec_of("layer.w", tensor)


def test_a_strided_shard_is_known_by_its_factor(mesh: DeviceMesh) -> None:
    tensor = placed_as(mesh, torch.zeros(2, 3), (10, 3), _StridedShard(0, split_factor=2), Shard(0))
    assert spec_of("w", tensor) == TensorSpec("w", "float32", (10, 3), Mesh((4, 2), tuple(range(SIZE))), ("S0/2", "S0"))


def test_a_strided_shard_that_is_cut_in_another_way_than_fully_shard_cuts_is_refused(mesh: DeviceMesh) -> None:
    tensor = placed_as(mesh, torch.zeros(2, 3), (9, 3), _StridedShard(0, split_factor=2), Shard(0))
    with pytest.raises(
        UnsupportedTensor, match=r"w: this rank holds \[2, 3\] of a strided shard that should be \[1, 3\]"
    ):
        spec_of("w", tensor)


def test_a_private_dtensor_is_its_local_part(mesh: DeviceMesh) -> None:
    tensor = distribute_tensor(torch.zeros(8, 2), mesh, (Shard(0), Replicate()))
    assert spec_of("w", tensor, private=True) == TensorSpec("w", "float32", (2, 2), private=True)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", ITEM_BYTES)
def test_every_dtype_of_the_format_is_torchs(name: str) -> None:
    tensor = torch.zeros(3, dtype=torch.uint8).new_empty(3, dtype=torch_dtype(name))
    assert dtype_name(tensor.dtype) == name
    assert spec_of("w", tensor).nbytes == 3 * tensor.element_size()


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
    ],
)
def test_a_tensor_that_is_not_plain_and_dense_is_refused_by_name(tensor: torch.Tensor, problem: str) -> None:
    with pytest.raises(UnsupportedTensor, match=f"^layer: .*{problem}"):
        spec_of("layer", tensor)


def test_a_dtype_that_this_torch_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedTensor, match="float3"):
        torch_dtype("float3")


def test_many_items_are_those_that_each_tensor_makes_whatever_the_list_before_was(mesh: DeviceMesh) -> None:
    plain = [torch.zeros(8, 2), torch.zeros(3)]
    sharded = [distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0), Replicate()]), torch.zeros(3)]
    other = [torch.zeros(8, 2, dtype=torch.int32), torch.zeros(3)]
    longer = [torch.zeros(8, 3), torch.zeros(3)]
    for tensors in (plain, plain, sharded, plain, other, plain, longer, sharded, sharded):
        items = items_of(["m.a", "m.b"], tensors)
        singly = [item_of(key, tensor, late=True) for key, tensor in zip(["m.a", "m.b"], tensors, strict=True)]
        assert [item.spec for item in items] == [item.spec for item in singly]
        assert all(a.local is b.local for a, b in zip(items, singly, strict=True))
        assert all(item.late for item in items)
    assert items_of([], []) == []

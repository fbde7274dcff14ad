"""A tensor and what the layout needs to know of it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import msgspec
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard, _StridedShard

from ftrain.core.layout import Mesh, TensorSpec, item_bytes, local_shard
from ftrain.core.placement import REPLICATED, sharded
from ftrain.core.write_plan import WriteItem
from ftrain.errors import UnsupportedTensor

_shape = operator.attrgetter("shape")
_dtype = operator.attrgetter("dtype")
_layout = operator.attrgetter("layout")
_is_meta = operator.attrgetter("is_meta")
_names: dict[torch.dtype, str] = {}
_meshes: WeakKeyDictionary[DeviceMesh, Mesh] = WeakKeyDictionary()


class TensorItem(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What this rank holds of one tensor: `local` has the shape of `layout.local_shard(spec, rank)`.

    `late`: it changes in an optimizer's step and nowhere else, so that a snapshot may copy it beside the training.
    """

    spec: TensorSpec
    local: torch.Tensor
    late: bool = False


def item_of(key: str, tensor: torch.Tensor, private: bool = False, late: bool = False) -> TensorItem:
    """The item of a tensor or DTensor: itself, not a copy. Raises as `spec_of`."""
    return TensorItem(spec_of(key, tensor, private), local_of(tensor), late)


class _Alike(msgspec.Struct, frozen=True):
    """The tensors of an earlier list: usually the next one that begins alike has tensors of the same keys and kinds."""

    keys: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    kinds: Sequence[object]
    specs: Sequence[TensorSpec]


_alike: dict[str, _Alike] = {}  # by the first key
LISTS_MAX = 64


def items_of(keys: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[TensorItem]:
    """The items of many shared tensors that are copied late: as `item_of`, quicker where they are as last time."""
    are_plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    known = _alike.get(keys[0]) if keys and are_plain else None
    kinds = [*map(_dtype, tensors), *map(_layout, tensors), *map(_is_meta, tensors)]
    if known is not None and keys == known.keys and kinds == known.kinds and list(map(_shape, tensors)) == known.shapes:
        return list(map(TensorItem, known.specs, tensors, itertools.repeat(True)))
    items = [item_of(key, tensor, late=True) for key, tensor in zip(keys, tensors, strict=True)]
    if keys and are_plain:
        specs = [item.spec for item in items]
        if len(_alike) >= LISTS_MAX:
            _alike.clear()
        _alike[keys[0]] = _Alike(keys, [spec.shape for spec in specs], kinds, specs)
    return items


def written_of(write: WriteItem, local: torch.Tensor) -> torch.Tensor:
    """What a rank writes of its local tensor: as a rule the tensor itself."""
    return local if write.offset is None else part_of(local, write.offset, write.box.shape)


def part_of(local: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The block of a local tensor at an offset: a view, which counts its changes with the tensor."""
    view = local.detach()
    for dim, (begin, count) in enumerate(zip(offset, shape, strict=True)):
        view = view.narrow(dim, begin, count)
    return view


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it: the very object that optimizers change, so that it can be watched."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def spec_of(key: str, tensor: torch.Tensor, private: bool = False) -> TensorSpec:
    """What the layout knows a tensor by. A private DTensor is taken for its local part.

    Raises `UnsupportedTensor` naming the key: for a DTensor that is yet to be summed (Partial) or is placed in a way
    that the format does not know, and for a tensor that is not dense or of a dtype that the format does not have.
    """
    dtype = dtype_name(tensor.dtype)
    item_bytes(dtype, key)
    if isinstance(tensor, DTensor) and not private:
        placements = tuple(_placement(key, placement, tensor.dim()) for placement in tensor.placements)
        spec = TensorSpec(key, dtype, tuple(tensor.shape), _mesh_of(tensor.device_mesh), placements)
        _refuse_odd_shard(spec, tensor)
        return spec
    local = local_of(tensor)
    _refuse_without_data(key, local)
    return TensorSpec(key, dtype, tuple(local.shape), private=private)


def _mesh_of(device_mesh: DeviceMesh) -> Mesh:
    mesh = _meshes.get(device_mesh)
    if mesh is None:
        ranks = device_mesh.mesh  # which torch works out anew each time
        mesh = _meshes[device_mesh] = Mesh(tuple(ranks.shape), tuple(ranks.flatten().tolist()))
    return mesh


def _refuse_without_data(key: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "has no data (device meta)" if tensor.is_meta else f"is not dense ({tensor.layout})"
        raise UnsupportedTensor(f"{key}: {kind}; a checkpoint holds dense tensors with data, so convert it first")


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    name = _names.get(dtype)
    if name is None:
        name = _names[dtype] = str(dtype).removeprefix("torch.")
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The other way round. Raises `UnsupportedTensor` where this torch has no such dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedTensor(f"this version of torch ({torch.__version__}) has no dtype {name}; use a newer one")
    return dtype


def _placement(key: str, placement: Placement, dimensions: int) -> str:
    # By exact type: relatives of Shard mean another order of bytes.
    if type(placement) is Replicate:
        return REPLICATED
    if type(placement) is Shard:
        return sharded(placement.dim % dimensions)
    if type(placement) is _StridedShard:
        return sharded(placement.dim % dimensions, int(placement.split_factor))
    if isinstance(placement, Partial):
        raise UnsupportedTensor(
            f"{key}: a DTensor placed as {placement} has no value yet, each rank holds a part of a sum; call "
            ".redistribute() with Replicate() or Shard(…) in its place and save what that returns"
        )
    raise UnsupportedTensor(
        f"{key}: a DTensor placed as {placement} cannot be in a checkpoint; redistribute it to Shard or Replicate"
    )


def _refuse_odd_shard(spec: TensorSpec, tensor: DTensor) -> None:
    """A strided shard of uneven size may be cut in two ways (`core.placement`): what is there has to be ours."""
    if not any(type(placement) is _StridedShard for placement in tensor.placements):
        return
    found = local_shard(spec, tensor.device_mesh.get_rank())
    local = tuple(tensor._local_tensor.shape)
    if found is not None and found.shape != local:
        raise UnsupportedTensor(
            f"{spec.key}: this rank holds {list(local)} of a strided shard that should be {list(found.shape)}: its "
            "uneven parts are not those that fully_shard makes; redistribute it to Shard or Replicate"
        )

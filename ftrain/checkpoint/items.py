"""A tensor and what the layout needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from ftrain.core.layout import Mesh, TensorSpec, item_bytes
from ftrain.errors import UnsupportedTensor


@dataclass(frozen=True, slots=True)
class TensorItem:
    """What this rank holds of one tensor: `local` has the shape of `layout.local_box(spec, rank)`."""

    spec: TensorSpec
    local: torch.Tensor


def item_of(key: str, tensor: torch.Tensor, private: bool = False) -> TensorItem:
    """The item of a tensor or DTensor; its storage is shared, not copied. Raises as `spec_of`."""
    spec = spec_of(key, tensor, private)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return TensorItem(spec, local.detach())


def spec_of(key: str, tensor: torch.Tensor, private: bool = False) -> TensorSpec:
    """What the layout knows a tensor by. A private DTensor is taken for its local part.

    Raises `UnsupportedTensor` naming the key: for a placement that is neither Replicate nor Shard, and for a tensor
    that is not dense or of a dtype that the format does not have.
    """
    dtype = dtype_name(tensor.dtype)
    item_bytes(dtype, key)
    if isinstance(tensor, DTensor) and not private:
        placements = tuple(_placement(key, placement, tensor.dim()) for placement in tensor.placements)
        mesh = Mesh(tuple(tensor.device_mesh.mesh.shape), tuple(tensor.device_mesh.mesh.flatten().tolist()))
        return TensorSpec(key, dtype, tuple(tensor.shape), mesh, placements)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.layout != torch.strided or local.is_meta:
        kind = "has no data (device meta)" if local.is_meta else f"is not dense ({local.layout})"
        raise UnsupportedTensor(f"{key}: {kind}; a checkpoint holds dense tensors with data, so convert it first")
    return TensorSpec(key, dtype, tuple(local.shape), private=private)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The other way round. Raises `UnsupportedTensor` where this torch has no such dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedTensor(f"this version of torch ({torch.__version__}) has no dtype {name}; use a newer one")
    return dtype


def _placement(key: str, placement: Placement, dimensions: int) -> str:
    # By exact type: _StridedShard is a relative of Shard in some versions of torch, and means another order of bytes.
    if type(placement) is Replicate:
        return "R"
    if type(placement) is Shard:
        return f"S{placement.dim % dimensions}"
    raise UnsupportedTensor(
        f"{key}: a DTensor placed as {placement} cannot be in a checkpoint; redistribute it to Shard or Replicate "
        "(for a dimension that is sharded twice, save `full_tensor()`)"
    )

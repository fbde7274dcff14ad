"""Tensors into the arena. The one place through which their bytes go, on any device: where a faster engine goes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ftrain import _native
from ftrain.checkpoint.arena import Arena


def stage(copies: Sequence[tuple[int, torch.Tensor]], arena: Arena, slot: int, threads: int = 1) -> None:
    """Copy each tensor, as its elements in C order, to its byte offset in the slot's image. Complete on return."""
    address = arena.address(slot)
    direct = []
    for offset, tensor in copies:
        source = tensor.detach()
        if source.numel() == 0:
            continue
        if _is_plain_memory(source):
            direct.append((address + offset, source.data_ptr(), source.nbytes))
        else:
            place = torch.frombuffer(arena.view(slot, offset, source.nbytes), dtype=torch.uint8)
            place.view(source.dtype).view(source.shape).copy_(source)
    _native.copy_batch(direct, threads)


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    """The tensor's bytes lie in host memory just as they are to be written."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()

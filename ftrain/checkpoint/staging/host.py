"""Which tensors lie in host memory just as they are in a file: element after element in C order."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

_is_cpu = operator.attrgetter("is_cpu")


def lies_in_host_memory(tensor: torch.Tensor) -> bool:
    """The tensor's bytes lie in host memory just as they are to be written."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def all_lie_in_host_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """As `lies_in_host_memory` for each, quicker for thousands."""
    return (
        all(map(_is_cpu, tensors))
        and all(map(torch.Tensor.is_contiguous, tensors))
        and not any(map(torch.Tensor.is_conj, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
    )


def in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy of it for which `lies_in_host_memory`."""
    found = tensor.detach()
    return found if lies_in_host_memory(found) else found.cpu().resolve_conj().resolve_neg().contiguous()

"""A rank's boundary: what it alone knows there, as bytes for the black box, and the way back to it.

What ranks share (parameters, optimizer state) is not in these bytes: it is live where nothing has written to it since,
or it comes from a replica, an arena or storage.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ftrain import _native
from ftrain.checkpoint.staging.host import all_lie_in_host_memory, in_host_memory
from ftrain.checkpoint.state.items import TensorItem, torch_dtype
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.errors import MismatchedState, NotPlainData, UnsupportedTensor
from ftrain.worker import random_state, standing_optimizers
from ftrain.worker.data import Batches
from ftrain.worker.packing import pack, unpack

PRIVATE_BYTES_MAX = 64 << 20
WATCHED_MAX = 4096  # tensors; of more, a sample

_version = operator.attrgetter("_version")
_data_ptr = torch.Tensor.data_ptr


class _Described(msgspec.Struct, frozen=True, array_like=True):
    """A private tensor whose bytes are in the record."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class _Record(msgspec.Struct, frozen=True, array_like=True):
    """All that belongs to one rank at one boundary. It is read by this version alone: it never outlives the run."""

    plain: bytes  # packed
    tensors: tuple[_Described, ...]
    data: bytes  # of the tensors, back to back


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Record)


class Boundary:
    """The newest boundary of this process. `batches` may grow until the first `capture`."""

    def __init__(self, tracked: Tracked, batches: Sequence[Batches]) -> None:
        self._tracked = tracked
        self._batches = batches
        self._sizes: list[tuple[int, int]] | None = None
        self._shared: list[torch.Tensor] = []  # whose versions are looked at
        self._unkept: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._steps_begun = -1
        self._described: tuple[list[TensorItem], tuple[_Described, ...]] = ([], ())

    def capture(self) -> bytes | None:
        """Remember this boundary, and give what only this rank knows of it, for `roll_back`, here or in a successor.

        To be called at each boundary, also at the one before the first step. None where there can be no such record,
        and this boundary cannot be rolled back to: more than PRIVATE_BYTES_MAX of tensors are this rank's alone, or
        something is neither a tensor nor plain data. Private tensors on a device are waited for. Raises what the
        `state_dict` of a tracked object raises.
        """
        try:
            own = self._tracked.own()
            private = [item for item in own.items if item.spec.private]
            self._watch([item.local for item in own.items if not item.spec.private])
            plain = {
                "tracked": own.plain,
                "batches": [batches.mark() for batches in self._batches],
                "random": random_state.capture(),
            }
            if sum(item.local.nbytes for item in private) > PRIVATE_BYTES_MAX:
                return None
            packed = pack(plain, "the state at a boundary")
        except (NotPlainData, UnsupportedTensor):
            return None  # a snapshot names it, when one is taken
        return _ENCODER.encode(_Record(packed, self._describe(private), _bytes_of(private)))

    def live(self) -> bool:
        """Whether the tensors that ranks share are still those of the boundary.

        No optimizer has begun a step since, and the tensors' version counters stand still: all of them up to
        WATCHED_MAX, beyond that those of a sample. Writing through `.data` or NumPy is not counted.
        """
        return self._steps_begun == _steps_begun and list(map(_version, self._watched())) == self._versions

    def roll_back(self, data: bytes) -> None:
        """Put back what `capture` gave, in place: in the same process, or in one that has run up to the same loop.

        Shared tensors are right before this is called, or are made right after it: this does not touch them. Gradients
        are dropped. The caller takes part in a boundary then: it calls `capture` again. Raises `MismatchedState` where
        other things are tracked here.
        """
        record = _DECODER.decode(data)
        plain = unpack(record.plain)
        if len(plain["batches"]) != len(self._batches):
            raise MismatchedState(
                f"the boundary has {len(plain['batches'])} run.batches(…), this script makes {len(self._batches)}"
            )
        self._tracked.take_back(plain["tracked"], _tensors_of(record))
        for batches, state in zip(self._batches, plain["batches"], strict=True):
            batches.roll_back(state)
        random_state.restore(plain["random"])

    def _watch(self, unkept: list[torch.Tensor]) -> None:
        """`unkept` are buffers that nothing could put back."""
        sizes = self._tracked.sizes()
        if sizes != self._sizes:
            late = [item.local for item in self._tracked.collect().items if item.late and not item.local.is_inference()]
            self._shared = late[:: -(-len(late) // WATCHED_MAX)] if len(late) > WATCHED_MAX else late
            self._sizes = sizes
        self._unkept = unkept
        self._versions = list(map(_version, self._watched()))
        self._steps_begun = _steps_begun

    def _watched(self) -> list[torch.Tensor]:
        return self._shared + self._unkept if self._unkept else self._shared

    def _describe(self, private: list[TensorItem]) -> tuple[_Described, ...]:
        before, described = self._described
        if len(before) != len(private) or any(map(operator.is_not, before, private)):
            described = tuple(
                _Described(item.spec.key, item.spec.dtype, tuple(item.local.shape), item.local.nbytes)
                for item in private
            )
            self._described = (private, described)
        return described


def _bytes_of(items: Sequence[TensorItem]) -> bytes:
    """All local tensors' bytes, back to back."""
    if not items:
        return b""
    tensors = [item.local for item in items]
    if not all_lie_in_host_memory(tensors):
        tensors = _in_host_memory(tensors)
    sizes = [tensor.nbytes for tensor in tensors]
    data = bytearray(sum(sizes))
    address = ctypes.addressof(ctypes.c_char.from_buffer(data)) if data else 0
    pairs = []
    for source, nbytes in zip(map(_data_ptr, tensors), sizes, strict=True):
        if nbytes:
            pairs.append((address, source, nbytes))
            address += nbytes
    _native.copy_batch(pairs)
    return bytes(data)


def _in_host_memory(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those on a device in one transfer, for each is waited for."""
    there = [one.detach().resolve_conj().resolve_neg().contiguous() for one in tensors if one.device.type != "cpu"]
    found: list[torch.Tensor] = []
    if there:
        flat = torch.cat([one.reshape(-1).view(torch.uint8) for one in there]).cpu()
        found = list(torch.split(flat, [one.nbytes for one in there]))
    return [in_host_memory(one) if one.device.type == "cpu" else found.pop(0) for one in tensors]


def _tensors_of(record: _Record) -> dict[str, torch.Tensor]:
    data, begin, found = bytearray(record.data), 0, {}
    for one in record.tensors:
        dtype = torch_dtype(one.dtype)
        if one.nbytes:
            # A copy, so that it begins where an element of its type may.
            raw = torch.frombuffer(data, dtype=torch.uint8, offset=begin, count=one.nbytes).clone()
            found[one.key] = raw.view(dtype).view(one.shape)
        else:
            found[one.key] = torch.empty(one.shape, dtype=dtype)
        begin += one.nbytes
    return found


_steps_begun = 0  # by any optimizer of this process


def _before_optimizer_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _steps_begun
    if not standing_optimizers.passes_over(optimizer, args, kwargs):
        _steps_begun += 1


register_optimizer_step_pre_hook(_before_optimizer_step)

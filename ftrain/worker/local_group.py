"""A process group that needs no peers: each collective answers as if all members had given what this one gives.

A rank runs its training step with it before it meets the others. Reductions are the identity, gathering gives this
rank's own input for everybody, what only a peer could give (received, scattered from elsewhere) is zero. A peer's
object cannot be had: `broadcast_object_list` from elsewhere raises.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import FakeProcessGroup, Work
from torch.distributed import HashStore, ProcessGroup
from torch.distributed.distributed_c10d import GroupName
from torch.futures import Future

from ftrain.errors import Unrecoverable

Tensors = list[torch.Tensor]


class LocalGroup:
    """Of the given rank and size. Every Work is done when it is returned.

    What is asked of a group besides collectives, a ProcessGroup over torch's fake backend answers. That would do the
    collectives too, but leaves what is received unfilled, and its Works carry no result, which DDP's reducer wants.
    """

    def __init__(self, rank: int, size: int, name: str) -> None:
        self._rank = rank
        self._size = size
        self._plain = ProcessGroup(HashStore(), rank, size)
        self._plain._set_default_backend(ProcessGroup.BackendType.CUSTOM)
        fake = FakeProcessGroup._create_internal(rank, size)
        for device in ("cpu", "cuda"):
            self._plain._register_backend(torch.device(device), ProcessGroup.BackendType.CUSTOM, fake)
        self._plain._set_group_name(GroupName(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def abort(self) -> None:
        """There is nothing to abort."""

    def shutdown(self) -> None:
        """There is nothing to shut down."""

    # torch calls each of these with lists of tensors and an options object, or with the values of the options.

    def allreduce(self, tensors: Any, *_options: Any, **_named: Any) -> Work:
        return _done(_listed(tensors))

    def allreduce_coalesced(self, tensors: Any, *_options: Any, **_named: Any) -> Work:
        return _done(_listed(tensors))

    def broadcast(self, tensors: Any, root: Any = 0, *_options: Any, **_named: Any) -> Work:
        root_rank = getattr(root, "rootRank", root)
        if root_rank != self._rank and _asked_by("broadcast_object_list"):
            raise Unrecoverable(  # or it would decode an object from memory that nobody has filled
                f"broadcast_object_list: rank {self._rank} was started anew and has not met rank {root_rank} of its "
                "group yet, so it cannot have that rank's object; take it from a file or the environment instead"
            )
        return _done(_listed(tensors))

    def reduce(self, tensors: Any, *_options: Any, **_named: Any) -> Work:
        return _done(_listed(tensors))

    def barrier(self, *_options: Any, **_named: Any) -> Work:
        return _done([])

    def monitored_barrier(self, *_options: Any, **_named: Any) -> None:
        return None

    def allgather(self, outputs: Any, inputs: Any, *_options: Any, **_named: Any) -> Work:
        if isinstance(inputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        for list_, own in zip(outputs, inputs, strict=True):
            _fill(list_, [own] * len(list_))
        return _done([tensor for list_ in outputs for tensor in list_])

    def allgather_coalesced(self, output_lists: Any, inputs: Any, *_options: Any, **_named: Any) -> Work:
        for list_ in output_lists:  # one for each rank
            _fill(list_, inputs)
        return _done([tensor for list_ in output_lists for tensor in list_])

    def _allgather_base(self, output: torch.Tensor, input_: torch.Tensor, *_options: Any, **_named: Any) -> Work:
        return self.allgather_into_tensor_coalesced([output], [input_])

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, *_options: Any, **_named: Any) -> Work:
        for output, own in zip(outputs, inputs, strict=True):
            _fill([output.view(self._size, -1)], [own.reshape(1, -1).expand(self._size, -1)])
        return _done(outputs)

    def gather(self, outputs: Any, inputs: Any, *_options: Any, **_named: Any) -> Work:
        for list_ in outputs:  # none but at the root
            _fill(list_, list(inputs) * len(list_))
        return _done([tensor for list_ in outputs for tensor in list_])

    def scatter(self, outputs: Any, inputs: Any, *_options: Any, **_named: Any) -> Work:
        if inputs:
            _fill(outputs, [inputs[0][self._rank]])
        else:
            _fill_zero(outputs)
        return _done(outputs)

    def reduce_scatter(self, outputs: Any, inputs: Any, *_options: Any, **_named: Any) -> Work:
        if isinstance(outputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        _fill(outputs, [list_[self._rank] for list_ in inputs])
        return _done(outputs)

    def _reduce_scatter_base(self, output: torch.Tensor, input_: torch.Tensor, *_options: Any, **_named: Any) -> Work:
        return self.reduce_scatter_tensor_coalesced([output], [input_])

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, *_options: Any, **_named: Any) -> Work:
        own = [input_.reshape(self._size, -1)[self._rank] for input_ in inputs]
        _fill([output.view(-1) for output in outputs], own)
        return _done(outputs)

    def alltoall(self, outputs: Any, inputs: Any, *_options: Any, **_named: Any) -> Work:
        for output, input_ in zip(outputs, inputs, strict=True):
            _repeat(output, input_)
        return _done(outputs)

    def alltoall_base(self, output: torch.Tensor, input_: torch.Tensor, *_options: Any, **_named: Any) -> Work:
        _repeat(output, input_)
        return _done([output])

    def send(self, tensors: Any, *_options: Any, **_named: Any) -> Work:
        return _done(tensors)

    def recv(self, tensors: Any, *_options: Any, **_named: Any) -> Work:
        _fill_zero(tensors)
        return _done(tensors)

    def recv_anysource(self, tensors: Any, *_options: Any, **_named: Any) -> Work:
        return _Received(self.recv(tensors), (self._rank + 1) % self._size)

    # What these are called since torch 2.13.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base


class _Received(Work):
    """Work of a receive from anybody, which is asked from whom. torch refuses the answer that it was this rank."""

    def __init__(self, work: Work, source: int) -> None:
        super().__init__()
        self._work = work
        self._source = source

    def wait(self, *_timeout: Any, **_named: Any) -> bool:
        return True

    def get_future(self) -> Future[Tensors]:
        return self._work.get_future()

    def _source_rank(self) -> int:
        return self._source


def _listed(tensors: Any) -> Tensors:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _asked_by(name: str) -> bool:
    """Whether a function of that name is among the callers."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


def _done(tensors: Tensors) -> Work:
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    future: Future[Tensors] = Future(devices=list(devices))
    future.set_result(tensors)
    work: Work = c10d._create_work_from_future(future)  # type: ignore[attr-defined]  # not in torch's stub
    return work


def _fill(outputs: Tensors, values: Tensors) -> None:
    with torch.no_grad():  # as a real backend, which writes where autograd does not see it
        for output, value in zip(outputs, values, strict=True):
            output.copy_(value)


def _fill_zero(outputs: Tensors) -> None:
    _fill(outputs, [torch.zeros_like(output) for output in outputs])


def _repeat(output: torch.Tensor, input_: torch.Tensor) -> None:
    """Fill the output with the input, from its beginning again where it is shorter: the shapes are anybody's."""
    flat = input_.reshape(-1)
    wanted = output.numel()
    values = flat.repeat(-(-wanted // flat.numel()))[:wanted] if flat.numel() else output.new_zeros(wanted)
    _fill([output], [values.view(output.shape)])

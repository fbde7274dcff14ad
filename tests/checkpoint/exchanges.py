"""What ranks do in test_exchange.py: train, lose a process, and get its state back from others."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ftrain import _native
from ftrain.checkpoint import wire
from ftrain.checkpoint.reading.arena_restore import restore_from_arenas
from ftrain.checkpoint.reading.live_copy import copy_live, shard_of
from ftrain.checkpoint.snapshot import Snapshotter
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.checkpoint.wire import Wire
from ftrain.core.messages import Attempt
from ftrain.errors import FtrainError
from ftrain.worker import random_state
from ftrain.worker.boundary import Boundary
from ftrain.worker.data import Batches

SLOT = 1
ATTEMPT = Attempt(1, 3, 1)


class Script:
    """One rank's script. 5 and 3 rows are uneven on 2 ranks; on 4, one has none of the 3."""

    def __init__(self, rank: int, parallel: str, seed: int, processes: int = 0, width: int = 5) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 3), nn.Linear(3, 2)
        )
        self.model.register_buffer("scale", torch.full((3,), 0.5 * seed))
        if parallel == "ddp":
            self.model = DistributedDataParallel(self.model)
        elif parallel in ("fsdp", "hsdp"):
            world_size = dist.get_world_size()
            shape = (2, world_size // 2) if parallel == "hsdp" else (world_size,)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
            fully_shard(self.model[3], mesh=mesh)  # type: ignore[index,arg-type]
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(100 * seed + rank)
        data = [torch.sin(torch.arange(4) * (i + 1.0)) for i in range(24)]
        loader = DataLoader(data, 3, shuffle=True, num_workers=processes)  # type: ignore[arg-type]
        self.batches = Batches(loader, "batches 0", dist.get_world_size())
        self.tracked = Tracked()
        self.tracked.add("model", self.model)
        self.tracked.add("optimizer", self.optimizer)
        self.tracked.add("scheduler", self.scheduler)
        self.boundary = Boundary(self.tracked, [self.batches])

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(next(self.batches)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        random.random()
        np.random.rand()

    def everything(self) -> list[Any]:
        state = {key: _local(tensor) for key, tensor in self.model.state_dict().items()}
        moments = [[_local(one) for one in of.values()] for of in self.optimizer.state.values()]
        groups = [{key: value for key, value in one.items() if key != "params"} for one in self.optimizer.param_groups]
        return copy.deepcopy(
            [state, moments, groups, self.scheduler.state_dict(), random_state.capture(), self.batches.state()]
        )


def live(rank: int, parallel: str, pairs: list[tuple[int, int]], processes: int = 0, run_bytes: int = 0) -> str:
    """Some ranks are replaced after three steps, by newcomers whose optimizers never stepped."""
    _cut_runs(run_bytes)
    script = Script(rank, parallel, 1, processes)
    for _ in range(3):
        script.step()
    data = script.boundary.capture()
    assert data is not None
    expected = script.everything()
    shard = shard_of(script.tracked.collect().items, rank)
    newcomer = Script(rank, parallel, 2, processes)
    assert newcomer.boundary.capture() is not None  # as after a rehearsed step
    after = newcomer if rank in [target for _, target in pairs] else script
    copy_live(after.tracked, rank, pairs)
    after.boundary.roll_back(data)
    assert same(after.everything(), expected)
    assert after.boundary.capture() is not None
    assert after.boundary.live()
    assert shard_of(after.tracked.collect().items, rank) == shard
    return shard


class Odd(nn.Module):
    """Tensors of every sort: scalars, empty ones, strided ones, and dtypes that no network library sends."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.strided = nn.Parameter(torch.randn(3, 4).t())
        self.scalar, self.empty = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(0, 3))
        for name, dtype in {
            "a": torch.bfloat16,
            "b": torch.complex64,
            "c": torch.float64,
            "d": torch.complex128,
        }.items():
            self.register_parameter(name, nn.Parameter(torch.randn(7, dtype=dtype)))
        for dtype in (torch.bool, torch.int8, torch.uint16, torch.int64, torch.float8_e4m3fn):
            self.register_parameter(f"i{len(self._parameters)}", _fixed(torch.randint(0, 2, (5,)).to(dtype)))


def odd(rank: int, run_bytes: int) -> None:
    """Rank 1 and 2 get what rank 0 has; rank 3 takes no part."""
    _cut_runs(run_bytes)
    module, tracked = Odd(rank), Tracked()
    tracked.add("odd", module)
    copy_live(tracked, rank, [(0, 1), (0, 2)])
    assert same(dict(module.state_dict()), dict(Odd(3 if rank == 3 else 0).state_dict()))
    assert tuple(module.strided.stride()) == (1, 4)


def different(rank: int) -> str:
    """The newcomer runs another script."""
    script = Script(rank, "", 1, width=5 + rank)
    try:
        copy_live(script.tracked, rank, [(0, 1)])
    except FtrainError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def damaged(rank: int, of: str) -> str:
    """One bit is turned over on its way to rank 1."""
    script = Script(rank, "", 1)
    for _ in range(3):
        script.step()
    arena = _snapshot(script, rank)
    if rank == 1:
        _turn_a_bit()
    try:
        if of == "live":
            copy_live(script.tracked, rank, [(0, 1)])
        else:
            restore_from_arenas(script.tracked, arena, SLOT, ATTEMPT, rank, dist.get_world_size())
    except FtrainError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def arenas(rank: int, parallel: str, lost: list[int], processes: int = 0, run_bytes: int = 0) -> None:
    """A snapshot after three steps; two steps later some ranks are replaced, and all go back to it."""
    _cut_runs(run_bytes)
    script = Script(rank, parallel, 1, processes)
    for _ in range(3):
        script.step()
    arena = _snapshot(script, rank)
    expected = script.everything()
    for _ in range(2):
        script.step()
    newcomer = Script(rank, parallel, 2, processes)
    after = newcomer if rank in lost else script
    world_size = dist.get_world_size()
    plain = restore_from_arenas(after.tracked, arena, SLOT, ATTEMPT, rank, world_size)
    after.batches.restore(plain["batches"][0])
    after.batches.prepare()
    random_state.restore(plain["random"])
    assert same(after.everything(), expected)


def no_snapshot(rank: int, case: str) -> str:
    """What each rank says where one of them has not what is needed."""
    script = Script(rank, "ddp", 1)
    script.step()
    arena = _snapshot(script, rank)
    attempt = ATTEMPT
    if case == "unsealed" and rank == 1:
        arena.clear_index(SLOT)
    elif case == "older":
        attempt = Attempt(1, 4, 2)
    elif case == "other script" and rank == 0:
        script.tracked.add("more", torch.optim.SGD(script.model.parameters(), 0.1))
    elif case == "other shape":
        script = Script(rank, "ddp", 1, width=9)
    before = script.everything()[0]
    try:
        restore_from_arenas(script.tracked, arena, SLOT, attempt, rank, dist.get_world_size())
    except FtrainError as error:
        assert same(script.everything()[0], before)
        return f"{type(error).__name__}: {error}"
    return ""


def same(a: Any, b: Any) -> bool:
    """Bitwise, and of the same types."""
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(wire.as_bytes(a), wire.as_bytes(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(one, b[key]) for key, one in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def _snapshot(script: Script, rank: int) -> Arena:
    arena = Arena(_native.memory_file("test-arena"))
    snapshotter = Snapshotter(arena, rank, dist.get_world_size(), wire.gather_bytes, 0)
    part = script.tracked.collect()
    plain = {"tracked": part.plain, "batches": [script.batches.state()], "random": random_state.capture()}
    snapshotter.plan(part.items, plain)
    snapshotter.take(SLOT, ATTEMPT, part.items, plain)()
    return arena


def _cut_runs(nbytes: int) -> None:
    """Small tensors travel in many buffers, and those of half a buffer alone."""
    if nbytes:
        wire.BUFFER_BYTES, wire.LARGE_BYTES = nbytes, nbytes // 2


def _turn_a_bit() -> None:
    begin_receive, broadcast = Wire.begin_receive, dist.broadcast

    def turned(tensor: torch.Tensor) -> None:
        if tensor.numel() > 100:
            tensor[50] ^= 1

    class Turning:
        def __init__(self, work: dist.Work, tensor: torch.Tensor) -> None:
            self._work, self._tensor = work, tensor

        def wait(self) -> None:
            self._work.wait()
            if self._tensor.dtype == torch.uint8 and self._tensor[:1].item() != ord("{"):  # data, not words
                turned(self._tensor)

    def begin(wire: Wire, tensor: torch.Tensor) -> Any:
        return Turning(begin_receive(wire, tensor), tensor)

    def cast(tensor: torch.Tensor, source: int) -> None:
        broadcast(tensor, source)
        if source != dist.get_rank():
            turned(tensor)

    Wire.begin_receive, dist.broadcast = begin, cast  # type: ignore[assignment,method-assign]


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)

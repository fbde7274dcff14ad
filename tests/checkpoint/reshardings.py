"""What ranks do in test_resharding.py: hold one model in many layouts, save it in each, load it in each from all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn.parallel import DistributedDataParallel

import ftrain
from ftrain import _native
from ftrain.checkpoint import wire
from ftrain.checkpoint.reading.arena_restore import restore_from_arenas
from ftrain.checkpoint.reading.live_copy import copy_live
from ftrain.checkpoint.snapshot import Snapshotter
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.core.messages import Attempt
from ftrain.errors import MismatchedState, UnsupportedTensor
from tests.checkpoint.world import bits

STEP = 7
LATER = "-later"  # checkpoints that were saved asynchronously
FIRST, SECOND = ("up", "down", "batch"), ("norm", "head", "wide")


class Net(nn.Module):
    """Rows that no number of ranks divides: 7, 5, 3, 2 and 1 of them, so that some ranks have none."""

    def __init__(self, parts: tuple[str, ...] = FIRST + SECOND) -> None:
        super().__init__()
        made: dict[str, Callable[[], nn.Module]] = {
            "up": lambda: nn.Linear(6, 7),
            "down": lambda: nn.Linear(7, 3),
            "batch": lambda: nn.BatchNorm1d(3),
            "norm": lambda: nn.LayerNorm(3),
            "head": lambda: nn.Linear(3, 1),
            "wide": lambda: nn.Linear(5, 5),
        }
        for part in parts:
            setattr(self, part, made[part]())
        with torch.no_grad():
            for key, tensor in self.state_dict(keep_vars=True).items():
                tensor.copy_(value(key, tuple(tensor.shape)))


def value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What the whole tensor holds, however it is cut."""
    return torch.randint(1, 1000, shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) / 8


class Held:
    """A model, its optimizer and a tensor that is sharded in an odd way, as one layout holds them."""

    def __init__(self, model: nn.Module, odd: tuple[DeviceMesh, list[Placement]] | None = None) -> None:
        # Stages have other groups than the whole; the last option of each follows its parameters.
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        named = dict(inner.named_parameters())
        groups = [
            {"params": [one for key, one in named.items() if key.endswith("bias")], "weight_decay": 0.25},
            {"params": [one for key, one in named.items() if not key.endswith("bias")], "weight_decay": 0.5},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False)
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        whole = value("odd", (10, 4))
        self.odd = whole if odd is None else distribute_tensor(whole, *odd, src_data_rank=None)
        for parameter, state in self.optimizer.state.items():
            state["exp_avg"].copy_(parameter.detach() * 0.5 + 1)  # elementwise: the same wherever an element is
            state["exp_avg_sq"].copy_(parameter.detach() * parameter.detach())
            state["step"].fill_(STEP)
        self.inner = inner
        self.state = {"model": model, "optim": self.optimizer, "odd": {"t": self.odd}, "epoch": 3}
        self.expected = self.found()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything, as this rank holds it."""
        names = {id(one): key for key, one in self.inner.named_parameters()}
        found: dict[str, torch.Tensor] = {**self.inner.state_dict(), "odd": self.odd}
        for parameter, state in self.optimizer.state.items():
            found |= {f"{names[id(parameter)]}.{key}": tensor for key, tensor in state.items()}
        return {key: one.to_local() if isinstance(one, DTensor) else one for key, one in found.items()}

    def found(self) -> dict[str, bytes]:
        return {key: bits(tensor) for key, tensor in self.tensors().items()}

    def clear(self, *, state: bool) -> None:
        """Nothing is as it was; without `state` the optimizer is one that never stepped."""
        with torch.no_grad():
            for tensor in self.tensors().values():
                tensor.zero_()
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0
        self.state["epoch"] = 0
        if not state:
            self.optimizer.state.clear()

    def check(self) -> None:
        found = self.found()
        wrong = [key for key, data in self.expected.items() if found.get(key) != data]
        assert not wrong, wrong
        assert found.keys() == self.expected.keys()
        assert [group["weight_decay"] for group in self.optimizer.param_groups] == [0.25, 0.5]
        assert self.state["epoch"] == 3


def one() -> Held:
    return Held(Net())


def ddp() -> Held:
    return Held(DistributedDataParallel(Net()))


def fsdp() -> Held:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return Held(sharded(Net(), mesh), (mesh, [_StridedShard(0, split_factor=3)]))


def hsdp() -> Held:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    return Held(sharded(Net(), mesh), (mesh, [_StridedShard(0, split_factor=2), Shard(1)]))


def tp() -> Held:
    """Two ranks hold the model, as often as there are two."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    return Held(parallel(Net(), mesh), (mesh, [Shard(0)]))


def tp_fsdp() -> Held:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return Held(sharded(parallel(Net(), mesh["tensor"]), mesh["data"]), (mesh, [Shard(0), Shard(0)]))


def pipeline() -> Held:
    """Two stages; more ranks are replicas of these."""
    return Held(Net(FIRST if dist.get_rank() < dist.get_world_size() // 2 else SECOND))


def pipeline_fsdp() -> Held:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))["shard"]
    return Held(sharded(Net(FIRST if dist.get_rank() < 2 else SECOND), mesh))


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model.up if hasattr(model, "up") else model.wide, mesh=mesh)  # type: ignore[arg-type]
    return fully_shard(model, mesh=mesh)


def parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(
        model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel(), "wide": ColwiseParallel()}
    )


LAYOUTS: dict[int, dict[str, Callable[[], Held]]] = {
    1: {"one": one},
    2: {"ddp": ddp, "fsdp": fsdp, "tp": tp, "pipeline": pipeline},
    4: {
        "ddp": ddp,
        "fsdp": fsdp,
        "hsdp": hsdp,
        "tp": tp,
        "tp_fsdp": tp_fsdp,
        "pipeline": pipeline,
        "pipeline_fsdp": pipeline_fsdp,
    },
}


def save_each(rank: int, folder: str, size: int) -> None:
    del rank
    for name, make in LAYOUTS[size].items():
        held = make()
        ftrain.save(Path(folder, f"{name}-{size}"), held.state, step=STEP)
        ftrain.async_save(Path(folder, f"{name}-{size}{LATER}"), held.state, step=STEP).result(60)


def load_each(rank: int, folder: str, size: int) -> int:
    """Load every checkpoint in every layout, asynchronous ones in one process. Returns how many pairs there were."""
    del rank
    pairs = 0
    saved = sorted(one.name for one in Path(folder).iterdir() if size == 1 or not one.name.endswith(LATER))
    for name, make in LAYOUTS[size].items():
        held = make()
        for number, checkpoint in enumerate(saved):
            held.clear(state=number % 2 == 0)
            try:
                report = ftrain.load(Path(folder, checkpoint), held.state)
                held.check()
            except Exception as error:
                raise AssertionError(f"{checkpoint} in the layout {name}-{size}: {error}") from error
            assert report.step == STEP
            assert not (report.missing or report.unexpected or report.reshaped or report.cast)
            pairs += 1
    return pairs


class Strided(nn.Module):
    """A parameter of which every rank holds several boxes, twice; and one in whole."""

    def __init__(self, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        placements = (Replicate(), _StridedShard(1, split_factor=3))
        whole = value("strided", (3, 13)).to(dtype)
        self.strided = nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None))
        self.whole = nn.Parameter(value("whole", (4,)).to(dtype))

    def clear(self) -> None:
        with torch.no_grad():
            self.strided.to_local().zero_()
            self.whole.zero_()

    def holds(self, expected: list[bytes]) -> bool:
        return self.found() == expected

    def found(self) -> list[bytes]:
        return [bits(self.strided.to_local()), bits(self.whole)]  # type: ignore[attr-defined]


def exchange(rank: int, folder: str) -> None:
    """Strided shards come back from arenas, a replica, and a checkpoint: under another name, in another dtype."""
    mesh = init_device_mesh("cpu", (2, 2))
    module, tracked = Strided(mesh), Tracked()
    tracked.add("model", module)
    expected = module.found()
    arena, attempt = Arena(_native.memory_file("test-arena")), Attempt(1, 3, 1)
    snapshotter = Snapshotter(arena, rank, 4, wire.gather_bytes, 0)
    part = tracked.collect()
    plain = {"tracked": part.plain}
    snapshotter.plan(part.items, plain)
    snapshotter.take(0, attempt, part.items, plain)()
    module.clear()
    restore_from_arenas(tracked, arena, 0, attempt, rank, 4)
    assert module.holds(expected)
    if rank >= 2:
        module.clear()
    copy_live(tracked, rank, [(0, 2), (1, 3)])
    assert module.holds(expected)

    ftrain.save(Path(folder, "strided"), {"net": module})
    module.clear()
    report = ftrain.load(Path(folder, "strided"), {"model": module}, only="model.strided", rename={"net": "model"})
    assert report.loaded == ("model.strided",)
    assert module.found()[0] == expected[0]
    assert not module.whole.any()
    narrow = Strided(mesh, torch.bfloat16)
    ftrain.load(Path(folder, "strided"), {"net": narrow}, dtype="cast")
    assert narrow.holds(Strided(mesh, torch.bfloat16).found())
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial(), Replicate()])
    try:
        ftrain.save(Path(folder, "partial"), {"net": module, "sums": {"loss": partial}})
    except UnsupportedTensor as error:
        assert "sums.loss: a DTensor placed as" in str(error)  # noqa: PT017
    else:
        raise AssertionError("saved what has no value")
    ask_for_parts(rank, Path(folder, "parts"))
    ftrain.save(Path(folder, "partial"), {"sums": {"loss": partial.redistribute(mesh, [Replicate(), Replicate()])}})


def ask_for_parts(rank: int, path: Path) -> None:
    """Each rank asks for a tensor of its own; what nobody asks for is missed on all of them."""
    parts = {f"p{number}": torch.full((2,), float(number)) for number in range(5)}
    ftrain.save(path, {"all": parts, f"rank{rank}": {"x": torch.tensor(rank), "n": rank}, "n": 1})
    mine = {f"p{rank}": torch.zeros(2)}
    try:
        ftrain.load(path, {"all": mine})
    except MismatchedState as error:
        assert "only in the checkpoint: all.p4" in str(error)  # noqa: PT017
    else:
        raise AssertionError("nobody missed all.p4")
    report = ftrain.load(path, {"all": mine}, strict=False)
    assert (report.loaded, report.unexpected) == ((f"all.p{rank}",), ("all.p4",))
    assert mine[f"p{rank}"].tolist() == [rank, rank]
    other = (rank + 1) % 4
    values = {"x": torch.tensor(-1), "n": -1}
    ftrain.load(path, {f"rank{other}": values})  # an object that another rank had
    assert values == {"x": torch.tensor(other), "n": other}

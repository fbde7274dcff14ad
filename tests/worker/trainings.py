"""Small trainings for the harness: each is a function that a worker's process runs. `path` is where records go."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import ftrain
from ftrain.checkpoint.staging.arena import Arena
from ftrain.errors import OutOfMemory
from ftrain.worker import Run
from tests.worker.harness import record, wait_for

SAMPLES = 24


class Numbers(Dataset[tuple[torch.Tensor, int]]):
    """Sample i is a vector made of i, and i."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.sin(torch.arange(6) * (index + 1.0)), index


class Network(nn.Module):
    """Has what a checkpoint may stumble on: buffers that differ by rank, dropout, a tied and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.tied = self.second
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(16, 1)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(self.tied(torch.relu(self.norm(self.first(x)))))))


def build(parallel: str, run: Run) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model: nn.Module = Network()
    if parallel == "fsdp":
        fully_shard(model.second)  # type: ignore[arg-type]
        fully_shard(model)
    elif parallel == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(100 + run.rank)
    random.seed(100 + run.rank)
    np.random.seed(100 + run.rank)
    return model, optimizer


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter, *optimizer.state[parameter].values()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found.update(whole.detach().numpy().tobytes())
    return found.hexdigest()


def own_digest(model: nn.Module) -> str:
    """Of what this rank holds, buffers and all."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found.update(local.numpy().tobytes())
    return found.hexdigest()


def whole(path: str, parallel: str, steps: int, loader_workers: int = 0, own_generator: bool = False) -> None:
    """Trains, and records of each step its samples and one draw of each generator, at the end the digests."""
    run = ftrain.join()
    model, optimizer = build(parallel, run)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
    generator = torch.Generator().manual_seed(run.rank) if own_generator else None
    sampler = None if own_generator else DistributedSampler(Numbers(), run.world_size, run.rank, seed=3)
    shuffle = {"shuffle": True, "generator": generator} if own_generator else {"sampler": sampler}
    loader = DataLoader(Numbers(), 2, num_workers=loader_workers, **shuffle)  # type: ignore[arg-type]
    batches = run.batches(loader)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    for step in run.steps(steps):
        with step:
            inputs, indices = next(batches)
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
            step.log(loss=loss)
            _remember(path, run, step, samples=indices.tolist(), drawn=drawn, lr=scheduler.get_last_lr())
    record(path, f"end-{run.rank}", digest=digest(model, optimizer), own=own_digest(model))


def on_a_slow_host(path: str, steps: int) -> None:
    """`whole`, where memory for snapshots comes with the file `memory`: none if it says why."""
    reserve = Arena.reserve

    def slow(arena: Arena, *sizes: int) -> None:
        wait_for((Path(path) / "memory").exists)
        if why := (Path(path) / "memory").read_text():
            raise OutOfMemory(why)
        reserve(arena, *sizes)

    Arena.reserve = slow  # type: ignore[method-assign,assignment]
    whole(path, "ddp", steps)


def _remember(path: str, run: Run, step: int, **values: Any) -> None:
    record(path, f"rank-{run.rank}", generation=run.generation, step=int(step), **values)


def raising(path: str, at: int) -> None:
    """Rank 0's own code fails while its collectives are still under way."""
    run = ftrain.join()
    model, optimizer = build("ddp", run)
    run.track(model=model, optimizer=optimizer)
    for step in run.steps(10):
        with step:
            if step == at and run.rank == 0:
                dist.all_reduce(torch.ones(4), async_op=True)
                raise KeyError("the user's own")
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
    record(path, "unreachable")


def growing(path: str, steps: int, grow_at: int, only_rank: int | None) -> None:
    """A custom state whose shared tensors change: the optimizer takes its first step at `grow_at`."""
    run = ftrain.join()
    model, optimizer = build("ddp", run)
    run.track(model=model, optimizer=optimizer)
    for step in run.steps(steps):
        with step:
            model(torch.ones(2, 6)).sum().backward()
            if step >= grow_at and only_rank in (None, run.rank):
                optimizer.step()
            optimizer.zero_grad()
    record(path, f"end-{run.rank}", own=own_digest(model))


def refusing(path: str, what: str) -> None:
    """Uses the API wrongly, and records what it is told."""
    run = ftrain.join()
    model, optimizer = build("plain", run)
    try:
        if what == "no state":
            run.track(model=model, thing=object())
        elif what == "not plain":
            run.track(model=model, thing=_Custom({"deep": [1, {2, 3}]}))
        elif what == "unknown parameter":
            run.track(optimizer=optimizer)
        elif what == "name taken":
            run.track(model=model)
            run.track(model=model)
        elif what == "track late":
            run.steps(1)
            run.track(model=model)
        elif what == "steps twice":
            run.steps(1)
            run.steps(1)
        elif what == "join twice":
            ftrain.join()
        elif what == "log a vector":
            for step in run.steps(1):
                step.log(loss=torch.ones(3))
        elif what == "empty loader":
            next(run.batches([]))
    except ftrain.FtrainError as error:
        record(path, "refused", type=type(error).__name__, message=str(error))


class _Custom:
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def custom(path: str, steps: int) -> None:
    """Tracks an object of the user's own with tensors and plain data in many shapes."""
    run = ftrain.join()
    state = {"tensor": torch.full((2, 3), float(run.rank)), "nested": [(1, 2.5), {"b": b"\x00", 7: None}], "step": 0}
    own = _Custom(state)
    run.track(own=own)
    for step in run.steps(steps):
        with step:
            own.state["tensor"] += 1
            own.state["step"] = int(step) + 1
    record(
        path,
        f"end-{run.rank}",
        tensor=own.state["tensor"].tolist(),
        rest=repr(own.state["nested"]),
        step=own.state["step"],
    )


def other_model(path: str, steps: int, width: int) -> None:
    run = ftrain.join()
    model = nn.Linear(width, 1)
    run.track(model=model)
    try:
        for step in run.steps(steps):
            with step:
                pass
    except ftrain.FtrainError as error:
        record(path, "refused", type=type(error).__name__, message=str(error))


def dealt(path: str, steps: int, batch: int) -> None:
    """Records which samples were dealt, across world sizes."""
    run = ftrain.join()
    sampler = DistributedSampler(Numbers(), run.world_size, run.rank, seed=5)
    batches = run.batches(DataLoader(Numbers(), batch, sampler=sampler))
    model = nn.Linear(6, 1)
    torch.nn.init.ones_(model.weight)
    run.track(model=model)
    for step in run.steps(steps):
        with step:
            _, indices = next(batches)
            with torch.no_grad():
                model.weight += 1
            record(path, f"dealt-{run.rank}", generation=run.generation, step=int(step), samples=indices.tolist())
    record(path, f"end-{run.rank}", weight=model.weight.tolist())


def standing(path: str, parallel: str, steps: int) -> None:
    """Steps until it is at step 2, and from then on does nothing: what is restored stays."""
    run = ftrain.join()
    model, optimizer = build(parallel, run)
    run.track(model=model, optimizer=optimizer)
    for step in run.steps(steps):
        with step:
            if step < 2:
                model(torch.ones(2, 6) * (run.rank + 1)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    record(path, f"end-{run.generation}-{run.rank}", digest=digest(model, optimizer))

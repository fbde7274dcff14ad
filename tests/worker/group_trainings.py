"""What the ranks of ranks.py train: models under every kind of parallelism, hurt in the middle of a step.

The state at each boundary is written to files, one for each rank and step, from which all go on after a failure.
"""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ftrain.errors import PeerLost
from ftrain.worker import after_failure, groups
from tests.worker.harness import record
from tests.worker.ranks import Rank

WIDTH = 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    """With a buffer that DDP broadcasts, and a block that every other step leaves out where asked."""

    def __init__(self, norm: bool, skipping: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, 1)
        self.skipping = skipping
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            if not (self.skipping and number == 1 and self.step % 2):
                x = block(x)
        return self.head(self.norm(x))


def build(kind: str, rank: Rank) -> tuple[Network, nn.Module]:
    """(the network itself, what is called)."""
    torch.manual_seed(1)
    network = Network(norm=kind.startswith("ddp"), skipping=kind == "ddp unused")
    model: nn.Module = network
    if kind == "tp":
        mesh = init_device_mesh("cpu", (rank.size,))
        for block in network.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif kind in ("fsdp", "hsdp"):
        if kind == "hsdp":
            mesh = init_device_mesh("cpu", (2, rank.size // 2), mesh_dim_names=("replica", "shard"))
        else:
            mesh = init_device_mesh("cpu", (rank.size,))
        for block in network.blocks:
            fully_shard(block, mesh=mesh)  # type: ignore[arg-type]
        fully_shard(network, mesh=mesh)  # type: ignore[arg-type]
    else:
        dist._DEFAULT_FIRST_BUCKET_BYTES = 4096  # so that there are several buckets
        model = DistributedDataParallel(network, bucket_cap_mb=1 / 128, find_unused_parameters=kind == "ddp unused")
        if kind == "ddp compiled":
            model = torch.compile(model, backend="eager")  # type: ignore[assignment]  # generating code takes minutes
    return network, model


class Hurt:
    """Lets this process kill or stop itself at a place inside a step."""

    def __init__(self, network: Network, at: int, where: str, signal_number: int) -> None:
        self.step = -1
        self._at = at
        self._where = where
        self._signal = signal_number
        network.blocks[1].up.register_forward_hook(self._forward)

    def at(self, where: str) -> None:
        if self.step == self._at and self._where == where:
            os.kill(os.getpid(), self._signal)

    def _forward(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        self.at("forward")
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, _gradient: torch.Tensor) -> None:
        self.at("backward")


def trained(
    rank: Rank,
    kind: str,
    steps: int,
    hurt_rank: int | None = None,
    hurt_at: int = 0,
    where: str = "",
    signal_number: int = int(signal.SIGKILL),
    layouts: bool = False,
) -> None:
    """Trains; the victim hurts itself, the others go on from the last boundary that all have reached.

    With `layouts`, who is started anew takes the layout of DDP's buckets from a survivor, instead of rehearsing.
    """
    network, model = build(kind, rank)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    state = _State(rank, network, optimizer)
    hurt = Hurt(network, hurt_at if rank.rank == hurt_rank else -1, where, signal_number)
    step = 0
    if rank.alone:
        assert groups.is_local()
        line = state.line(without=rank.rank)
        if layouts:
            survivor = (rank.rank + 1) % rank.size
            after_failure.lay_out_buckets([model], torch.load(state.path(f"layouts-{survivor}")))
        else:
            _step(rank, network, model, optimizer, 1, Hurt(network, -1, "", 0))
            if line > 0:
                after_failure.settle_buckets([model])
            else:
                after_failure.recover_modules([model], first_step=True)
        assert rank.collectives == 0
        step = _go_on(rank, state, line)
    else:
        state.save(0)
    while step < steps:
        try:
            hurt.step = step
            _step(rank, network, model, optimizer, step, hurt)
            step += 1
            state.save(step)
            hurt.at("boundary")
        except (PeerLost, RuntimeError) as error:
            rank.say("raised", type(error).__name__, str(error))
            rank.next_generation()
            assert groups.is_revoked()
            groups.rehearse()
            torch.save(after_failure.bucket_layouts([model]), state.path(f"layouts-{rank.rank}"))
            assert hurt_rank is not None
            line = state.line(without=hurt_rank)
            after_failure.recover_modules([model], first_step=line == 0)
            step = _go_on(rank, state, line)
    layout = after_failure.bucket_layouts([model])
    record(str(rank.path), f"end-{rank.rank}", digest=state.digest(), started_anew=rank.alone, layout=layout)
    dist.barrier()


def _step(rank: Rank, network: Network, model: nn.Module, optimizer: Any, step: int, hurt: Hurt) -> None:
    network.step = step
    data_rank = 0 if isinstance(network.blocks[0].up.weight, DTensor) and _is_tensor_parallel(network) else rank.rank
    generator = torch.Generator().manual_seed(1000 * step + data_rank)
    loss = model(torch.randn(4, WIDTH, generator=generator)).square().mean()
    hurt.at("between")
    loss.backward()
    hurt.at("optimizer")
    optimizer.step()
    optimizer.zero_grad()


def _is_tensor_parallel(network: Network) -> bool:
    return not isinstance(network.head.weight, DTensor)


def _go_on(rank: Rank, state: _State, line: int) -> int:
    """From that boundary, in the next generation."""
    state.load(line)
    rank.connect()
    return line


class _State:
    def __init__(self, rank: Rank, network: Network, optimizer: torch.optim.Optimizer) -> None:
        self._rank = rank
        self._network = network
        self._optimizer = optimizer

    def path(self, name: str) -> Path:
        return self._rank.path / f"{name}.pt"

    def save(self, step: int) -> None:
        tensors = {name: _own(tensor).clone() for name, tensor in self._network.state_dict().items()}
        moments = [
            {key: _own(value).clone() for key, value in self._optimizer.state.get(parameter, {}).items()}
            for parameter in self._network.parameters()
        ]
        unfinished = self.path(f"unfinished-{self._rank.rank}")
        torch.save((tensors, moments), unfinished)
        unfinished.rename(self.path(f"state-{self._rank.rank}-{step}"))

    def line(self, without: int) -> int:
        """The newest step that all ranks have saved, asked by the living ones, which save no more."""
        others = [one for one in range(self._rank.size) if one != without]
        saved = f"saved/{self._rank.generation}"
        self._rank.store.set(f"{saved}/{self._rank.rank}", "")
        self._rank.store.wait([f"{saved}/{one}" for one in others])
        step = 0
        while all(self.path(f"state-{one}-{step + 1}").exists() for one in range(self._rank.size)):
            step += 1
        return step

    def load(self, step: int) -> None:
        tensors, moments = torch.load(self.path(f"state-{self._rank.rank}-{step}"))
        with torch.no_grad():
            for name, tensor in self._network.state_dict().items():
                _own(tensor).copy_(tensors[name])
            for parameter, values in zip(self._network.parameters(), moments, strict=True):
                if not values:
                    self._optimizer.state.pop(parameter, None)
                elif parameter not in self._optimizer.state:
                    self._optimizer.state[parameter] = {key: _like(parameter, value) for key, value in values.items()}
                else:
                    for key, value in values.items():
                        _own(self._optimizer.state[parameter][key]).copy_(value)

    def digest(self) -> str:
        found = hashlib.sha256()
        for name, tensor in sorted(self._network.state_dict().items()):
            found.update(name.encode())
            found.update(_own(tensor).contiguous().numpy().tobytes())
        for parameter in self._network.parameters():
            for value in self._optimizer.state[parameter].values():
                found.update(_own(value).contiguous().numpy().tobytes())
        return found.hexdigest()


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value.clone()
    return DTensor.from_local(
        value.clone(), parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )

"""What `bench/recovery.py` trains: one model and one loop, written for each launcher as its users would.

Not meant to be run by hand. Each rank appends one line to RECORDS/rank-R after each finished step: the time, the step
and its process, and leaves a digest of its parameters in RECORDS/parameters-R at the end. Only what a branch needs is
imported in it, so that no launcher pays for another's libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

VOCABULARY = 256
LEARNING_RATE = 1e-4


class SmallGPT(nn.Module):
    """Tokens [batch, length + 1] to the mean loss of each next one: 25 million parameters with 8 layers 512 wide."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(given.shape[1])
        logits = self.head(self.body(self.embedding(given), mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("launcher", choices=tuple(BRANCHES))
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--ranks-min", type=int, default=1, help="torchft: no step is done with fewer")
    args = parser.parse_args()
    BRANCHES[args.launcher](args)


def train_with_ftrain(args: argparse.Namespace) -> None:
    """The worker API; `ftrain launch --checkpoint-every` says how often."""
    import ftrain

    run = ftrain.join()
    model = parallel(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    run.track(model=model, optimizer=optimizer)
    for step in run.steps(args.steps):
        with step:
            train_step(model, optimizer, tokens(args, step.number, run.rank))
            record(args.records, run.rank, step.number)
    record_parameters(args.records, run.rank, model)


def train_with_torchrun(args: argparse.Namespace) -> None:
    """Every rank loads the newest checkpoint when it starts."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    train_from_checkpoint(args, lambda: None)
    dist.destroy_process_group()


def train_with_nvidia(args: argparse.Namespace) -> None:
    """The same with a heartbeat after each step; `ft_launcher --ft-param-...` says how long one may be away."""
    import torch.distributed as dist
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    dist.init_process_group("gloo")
    client = RankMonitorClient()
    client.init_workload_monitoring()
    train_from_checkpoint(args, client.send_heartbeat)
    client.shutdown_workload_monitoring()
    dist.destroy_process_group()


def train_from_checkpoint(args: argparse.Namespace, after_step: Callable[[], None]) -> None:
    """DDP's checkpoint is one file of rank 0, FSDP2's is one of DCP."""
    rank = torch.distributed.get_rank()
    model = parallel(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    load, save = (load_sharded, save_sharded) if args.parallel == "fsdp" else (load_file, save_file)
    first = load(args.records, model, optimizer)
    for step in range(first, args.steps):
        train_step(model, optimizer, tokens(args, step, rank))
        record(args.records, rank, step)
        after_step()
        if (step + 1) % args.checkpoint_every == 0:
            save(args.records, model, optimizer, step + 1)
    record_parameters(args.records, rank, model)


def train_with_torchft(args: argparse.Namespace) -> None:
    """Each rank is a replica group. One that starts heals from a living one, and has no part in its first gradient.

    What was done with fewer than all ranks is told in RECORDS/fewer-R. There is no checkpoint: that is for the loss of
    all replicas.
    """
    from torchft import DistributedDataParallel as ManagedDDP
    from torchft import Manager, Optimizer, ProcessGroupGloo

    rank, world_size = int(os.environ["REPLICA_GROUP_ID"]), int(os.environ["NUM_REPLICA_GROUPS"])

    def state_dict() -> dict[str, object]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load_state_dict(state: dict[str, dict[str, object]]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        min_replica_size=args.ranks_min,
        timeout=timedelta(seconds=30),
        replica_id=f"small_gpt_{rank}",
    )
    torch.manual_seed(1)
    model = ManagedDDP(manager, SmallGPT(args.layers, args.width))
    optimizer = Optimizer(manager, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
    while manager.current_step() < args.steps:
        optimizer.zero_grad()
        model(tokens(args, manager.current_step(), rank)).backward()
        step = manager.current_step()  # healing may have changed it during the forward pass
        optimizer.step()
        if manager.current_step() > step:
            whole = manager.num_participants() == world_size
            record(args.records, rank, step, kind="rank" if whole else "fewer")
    record_parameters(args.records, rank, model)
    manager.shutdown()


def load_file(records: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    checkpoint = records / "checkpoint.pt"
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location="cpu")
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def save_file(records: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    if torch.distributed.get_rank() == 0:
        temporary = records / "checkpoint.tmp"
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, temporary)
        temporary.replace(records / "checkpoint.pt")


def load_sharded(records: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    found = sorted(path.parent for path in records.glob("dcp-*/.metadata"))
    if not found:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=found[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(found[-1].name.removeprefix("dcp-"))


def save_sharded(records: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=records / f"dcp-{step:08d}")


BRANCHES: dict[str, Callable[[argparse.Namespace], None]] = {
    "ftrain": train_with_ftrain,
    "torchrun": train_with_torchrun,
    "nvidia": train_with_nvidia,
    "torchft": train_with_torchft,
}


def parallel(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(1)
    model = SmallGPT(args.layers, args.width)
    if args.parallel == "ddp":
        return DistributedDataParallel(model)
    for layer in model.body.layers:
        fully_shard(layer)
    return fully_shard(model)


def tokens(args: argparse.Namespace, step: int, rank: int) -> torch.Tensor:
    """The same for the same step and rank under every launcher, whatever was done before."""
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    return torch.randint(VOCABULARY, (args.batch, args.length + 1), generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def record(records: Path, rank: int, step: int, kind: str = "rank") -> None:
    with (records / f"{kind}-{rank}").open("a") as file:
        file.write(f"{time.time():.4f} {step} {os.getpid()}\n")


def record_parameters(records: Path, rank: int, model: nn.Module) -> None:
    """SHA-256 of the parameters that this rank holds, in the order of the model."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        digest.update(own.detach().contiguous().numpy().data)
    (records / f"parameters-{rank}").write_text(digest.hexdigest())


if __name__ == "__main__":
    main()

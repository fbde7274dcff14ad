"""A training that is small enough to be hurt often, and that accounts for every step it does.

It has what a checkpoint must bring back: parameters, optimizer state, a schedule, BatchNorm's buffers, dropout and
other random numbers, and shuffled data. Each rank writes a line for each step that it finishes
(`steps-gGGGG-rR.jsonl`: step, sample numbers, a digest of the whole state), and at the end a digest of all that it
holds (`end-rR.json`).

FTRAIN_TEST_INJURIES, a list of {point, rank, step, how}, is what to do to itself, each once: `point` says where in that
step, or where in the first snapshot that is taken at that step or later; `how` is a signal's name, "raise", "exit",
"note" or "await" with a word that one rank notes and others await, or one of `DELAYS`, of which not all end. With a
`generation`, not before that one.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import ftrain
from ftrain.checkpoint.snapshot import Snapshotter
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.staging.stage import Staging
from ftrain.worker.link import Link
from ftrain.worker.recovery import Recovery

SAMPLES, SAMPLES_PER_STEP, FEATURES, CLASSES = 180, 36, 8, 4
INJURIES = "FTRAIN_TEST_INJURIES"
SEALED_SECONDS = 2.0  # for the other ranks' seals of a snapshot, where an injury is to come after all of them
EXACT = ("forward", "step", "after the optimizer", "at the boundary")


class Injuries:
    """Hurts this rank as it was told, each injury once in the life of the run."""

    def __init__(self, out: Path, run: ftrain.Run) -> None:
        self._mine = [
            (number, injury)
            for number, injury in enumerate(json.loads(os.environ.get(INJURIES, "[]")))
            if injury["rank"] == run.rank
        ]
        self._out = out
        self._run = run
        self._snapshot_step = 0
        self._watch_snapshots()

    def at(self, point: str, step: int) -> None:
        for number, injury in self._mine:
            is_due = injury.get("generation", 0) <= self._run.generation and step >= injury["step"]
            if injury["point"] == point and is_due and (point not in EXACT or step == injury["step"]):
                try:
                    (self._out / f"injury-{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                _suffer(injury["how"], self._run)

    def _watch_snapshots(self) -> None:
        take, finish, seal, sealed = Snapshotter.take, Staging.finish, Arena.write_index, Link.sealed
        bring, reached = Recovery.bring, Recovery.reached

        def watched_take(this: Any, slot: int, attempt: Any, *arguments: Any) -> Any:
            self._snapshot_step = attempt.step
            self.at("before the copy", attempt.step)
            return take(this, slot, attempt, *arguments)

        def watched_finish(this: Any) -> None:
            self.at("in the copy", self._snapshot_step)
            finish(this)
            self.at("after the copy", self._snapshot_step)

        def watched_seal(this: Any, *arguments: Any) -> None:
            self.at("before the seal", self._snapshot_step)
            seal(this, *arguments)

        def watched_sealed(this: Any, *arguments: Any) -> None:
            sealed(this, *arguments)
            (self._out / f"sealed-g{self._run.generation}-{self._snapshot_step}-r{self._run.rank}").touch()
            if any(injury["point"] == "after all seals" for _, injury in self._mine):
                sealed_by_all = f"sealed-g{self._run.generation}-{self._snapshot_step}-r*"
                until = time.monotonic() + SEALED_SECONDS
                while len(list(self._out.glob(sealed_by_all))) < self._run.world_size and not this.revoked:
                    time.sleep(0.001)
                    if time.monotonic() > until:
                        return  # it was refused elsewhere: who had seen it before seals it all the same, alone
            self.at("after all seals", self._snapshot_step)

        def watched_bring(this: Any, coming: Any, *arguments: Any) -> Any:
            self.at("on the way", coming.line.step)
            return bring(this, coming, *arguments)

        def watched_reached(this: Any, step: int) -> None:
            self.at("at the boundary", step)
            reached(this, step)

        Recovery.bring = watched_bring  # type: ignore[method-assign]
        Recovery.reached = watched_reached  # type: ignore[method-assign]
        Snapshotter.take = watched_take  # type: ignore[method-assign]
        Staging.finish = watched_finish  # type: ignore[method-assign]
        Arena.write_index = watched_seal  # type: ignore[method-assign]
        Link.sealed = watched_sealed  # type: ignore[method-assign]


def _suffer(how: str, run: ftrain.Run) -> None:
    if how == "raise":
        raise ValueError("hurt on purpose")
    if how == "exit":
        os._exit(7)
    if how in DELAYS:
        DELAYS[how](run)
        return
    what, _, word = how.partition(" ")
    if word:
        assert run.run_dir is not None
        noted = run.run_dir.parent / f"noted-{word}"
        if what == "note":
            noted.touch()
        while not noted.exists():
            time.sleep(0.001)
        return
    os.kill(os.getpid(), signal.Signals[how])


def take_a_lock_twice(run: ftrain.Run) -> None:
    del run
    lock = threading.Lock()
    with lock, lock:
        raise AssertionError("a lock was taken twice")


def receive_from_rank_1(run: ftrain.Run) -> None:
    del run
    dist.recv(torch.zeros(1), 1)


def wait_for_each_other(run: ftrain.Run) -> None:
    """For two ranks."""
    dist.recv(torch.zeros(1), 1 - run.rank)


def evaluate(run: ftrain.Run, seconds: float = 27.0) -> None:
    """Longer than an idle process is given; it computes for a tenth of the time."""
    del run
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.process_time()
        while time.process_time() - began < 0.01:
            torch.ones(64, 64).matmul(torch.ones(64, 64))
        time.sleep(0.09)


def warm_up(run: ftrain.Run) -> None:
    evaluate(run, 4.0)


def load_slowly(run: ftrain.Run) -> None:
    """For many steps, but not for as long as an idle process is given."""
    del run
    subprocess.run(["sleep", "4"], check=True)


def collect_garbage(run: ftrain.Run) -> None:
    del run
    kept = [[[]] for _ in range(1_000_000)]
    gc.collect()
    del kept


def rest(run: ftrain.Run) -> None:
    """As long as an idle process is given, with leave."""
    with run.allow(60.0):
        time.sleep(25.0)


def wait_for_leave(run: ftrain.Run) -> None:
    """Until the test makes the file `leave` beside the run directory."""
    assert run.run_dir is not None
    with run.allow(600.0):
        while not (run.run_dir.parent / "leave").exists():
            time.sleep(0.01)


DELAYS: dict[str, Callable[[ftrain.Run], None]] = {
    "deadlock": take_a_lock_twice,
    "receive from rank 1": receive_from_rank_1,
    "wait for each other": wait_for_each_other,
    "evaluate": evaluate,
    "warm up": warm_up,
    "load slowly": load_slowly,
    "collect garbage": collect_garbage,
    "rest": rest,
    "wait for leave": wait_for_leave,
}


class Samples(Dataset[tuple[int, torch.Tensor, int]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, int]:
        return index, torch.sin(torch.arange(FEATURES) * (index + 1.0)), index % CLASSES


class Network(nn.Module):
    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.norm = nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width)
        self.drop = nn.Dropout(0.2)
        self.middle = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(self.first(x)))
        return self.last(x + self.middle(x))


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of the whole tensors: the same on all ranks, however many they are."""
    found = hashlib.sha256()
    for tensor in whole(list(tensors)):
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def whole(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, those that FSDP has spread over the ranks put together by one collective for all of them."""
    sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if not sharded:
        return tensors
    assert all(tensor.placements == (Shard(0),) for tensor in sharded)
    ranks = dist.get_world_size()
    sizes = [[_shard_size(tensor.shape, rank, ranks) for tensor in sharded] for rank in range(ranks)]
    mine = torch.cat([tensor.to_local().detach().flatten() for tensor in sharded])
    longest = sum(sizes[0])
    gathered = [torch.empty(longest) for _ in range(ranks)]
    dist.all_gather(gathered, nn.functional.pad(mine, (0, longest - len(mine))))
    shards = [row[: sum(own)].split(own) for row, own in zip(gathered, sizes, strict=True)]
    made = {id(tensor): torch.cat(parts).view(tensor.shape) for tensor, *parts in zip(sharded, *shards, strict=True)}
    return [made.get(id(tensor), tensor) for tensor in tensors]


def _shard_size(shape: torch.Size, rank: int, ranks: int) -> int:
    rows = -(-shape[0] // ranks)
    return max(0, min(rows, shape[0] - rank * rows)) * math.prod(shape[1:])


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What all ranks have in common."""
    return [tensor for parameter in model.parameters() for tensor in (parameter, *optimizer.state[parameter].values())]


class OwnAdamW(torch.optim.AdamW):
    """An optimizer of the user's own: of what its step does, nothing is known."""


def averaged(_state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of the user's own. What such a one remembers nobody knows."""
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


averaged.__annotations__.clear()  # torch compares them with its types, and these are names


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), required=True)
    parser.add_argument("--steps", type=int, default=0, help="0 is endless")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--norm", choices=("batch", "layer"), default="batch", help="batch: with buffers")
    parser.add_argument("--pause", type=float, default=0.03, help="seconds in each step")
    parser.add_argument("--hook", choices=("", "half", "own"), default="", help="DDP's communication hook")
    parser.add_argument("--optimizer", choices=("torch", "own"), default="torch")
    parser.add_argument("--told", action="store_true", help="rank 0 tells the others something first, as an object")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    run = ftrain.join()
    injuries = Injuries(args.out, run)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # however many ranks there are on a node
    torch.manual_seed(1)
    model: nn.Module = Network(args.width, args.norm)
    if args.parallel == "fsdp":
        fully_shard(model.middle)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
        if args.hook:
            model.register_comm_hook(None, {"half": default_hooks.fp16_compress_hook, "own": averaged}[args.hook])
    if args.told:
        told = ["a name" if run.rank == 0 else None]
        dist.broadcast_object_list(told, src=0)
        assert told == ["a name"]
    optimizer = (OwnAdamW if args.optimizer == "own" else torch.optim.AdamW)(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 7)
    torch.manual_seed(2 + run.rank)
    random.seed(2 + run.rank)
    sampler = DistributedSampler(Samples(), run.world_size, run.rank, seed=3)
    batches = run.batches(DataLoader(Samples(), SAMPLES_PER_STEP // run.world_size, sampler=sampler, drop_last=True))
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)

    account = (args.out / f"steps-g{run.generation:04d}-r{run.rank}.jsonl").open("a", buffering=1)
    for step in run.steps(args.steps or None):
        with step:
            began = digest(state(model, optimizer))
            indices, x, y = next(batches)
            x = x + 0.01 * torch.randn_like(x) + 0.01 * random.random()
            loss = nn.functional.cross_entropy(model(x), y)
            injuries.at("forward", step.number)
            loss.backward()
            injuries.at("step", step.number)
            optimizer.step()
            injuries.at("after the optimizer", step.number)
            optimizer.zero_grad()
            scheduler.step()
            time.sleep(args.pause)
            step.log(loss=loss)
            ended = digest(state(model, optimizer))
            line = {
                "step": step.number,
                "generation": run.generation,
                "pid": os.getpid(),
                "samples": indices.tolist(),
                "began": began,
                "ended": ended,
            }
            account.write(json.dumps(line) + "\n")

    end = {
        "state": digest(state(model, optimizer)),
        "buffers": digest(model.buffers()),
        "random": [random.random(), *torch.rand(2).tolist()],
        "rates": scheduler.get_last_lr(),
    }
    (args.out / f"end-r{run.rank}.json").write_text(json.dumps(end))
    dist.barrier()


if __name__ == "__main__":
    main()

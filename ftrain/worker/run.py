"""A run as its training script sees it: join, track, batches, steps."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from ftrain.checkpoint.items import TensorItem
from ftrain.checkpoint.restore import Checkpoint
from ftrain.checkpoint.tracked import Tracked
from ftrain.core import local
from ftrain.core.manifest import decode_index
from ftrain.core.messages import Attempt
from ftrain.core.page import Field, Phase
from ftrain.errors import CorruptCheckpoint, UsageError
from ftrain.storage import open_storage
from ftrain.worker import process_group, random_state
from ftrain.worker.data import Batches
from ftrain.worker.link import Armed, Link, from_environment, leave_signals_to_agent
from ftrain.worker.snapshots import Snapshots

GROUP_TIMEOUT = timedelta(minutes=10)
_joined: list[Run] = []


def join() -> Run:
    """Take part in the run that this process belongs to, and make the default process group.

    Under `ftrain launch` the run survives failures. Under another launcher that sets RANK and WORLD_SIZE it trains
    without that; a plain `python train.py` is a run of one rank. Raises `UsageError` when called twice.
    """
    if _joined:
        raise UsageError("ftrain.join() was called twice: a process takes part in one run")
    if dist.is_initialized():
        raise UsageError("ftrain.join() makes the default process group: call it instead of init_process_group")
    link = from_environment()
    run = Run(link)
    _joined.append(run)
    return run


class Run:
    """This rank's part in a run. Made by `join`."""

    def __init__(self, link: Link | None) -> None:
        self._link = link
        environment = os.environ
        self.rank = link.boot.rank if link else int(environment.get("RANK", "0"))
        self.local_rank = link.boot.local_rank if link else int(environment.get("LOCAL_RANK", "0"))
        self.world_size = link.boot.world_size if link else int(environment.get("WORLD_SIZE", "1"))
        self.generation = link.boot.generation if link else 1
        self.run_dir = Path(link.boot.run_dir) if link else None
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if link is not None:
            leave_signals_to_agent()
            link.enter(Phase.JOINED)
            link.say(local.WorkerJoined())
        elif self.rank == 0:
            print("ftrain: not started by `ftrain launch`: no checkpoints, no recovery", file=sys.stderr)
        store = self._make_group()
        self._snapshots = Snapshots(link, store, self._capture) if link and link.boot.checkpoints else None
        self._tracked = Tracked()
        self._batches: list[Batches] = []
        self._steps: Steps | None = None

    @property
    def restarted(self) -> bool:
        """Whether the run goes on from an earlier commit."""
        return self._link is not None and self._link.boot.resume is not None

    def track(self, **objects: object) -> None:
        """Let these be part of every snapshot: modules, optimizers, anything with `state_dict` and `load_state_dict`.

        Random number generators are always tracked. Raises `UsageError` for anything else, for a name that is taken,
        and after `steps`; `NotPlainData` naming the key of a value that is neither a tensor nor plain data.
        """
        if self._steps is not None:
            raise UsageError(
                "track was called after steps: the state was restored already; track everything before the loop"
            )
        for name, found in objects.items():
            self._tracked.add(name, found)
        self._tracked.check()

    def batches(self, loader: Iterable[Any]) -> Batches:
        """An endless iterator over the loader, epoch after epoch, whose position is tracked: see `docs/worker.md`."""
        if self._steps is not None:
            raise UsageError(
                "batches was called after steps: the position was restored already; call it before the loop"
            )
        made = Batches(loader, f"batches {len(self._batches)}", self.world_size)
        self._batches.append(made)
        return made

    def steps(self, total: int | None) -> Steps:
        """The steps still to do of `total` (None: endless). Restores the newest commit first."""
        if self._steps is not None:
            raise UsageError("steps was called twice: a run has one training loop")
        if total is not None and total < 0:
            raise UsageError(f"steps({total}): the number of steps cannot be negative")
        self._steps = Steps(self, total)
        return self._steps

    # ----------------------------------------------------------------------------------------------- for Steps only

    @property
    def link(self) -> Link | None:
        return self._link

    @property
    def snapshots(self) -> Snapshots | None:
        """None where the run takes no checkpoints."""
        return self._snapshots

    @property
    def must_rehearse(self) -> bool:
        """A resumed run has to do one step for nothing first: see `Steps`. With two ranks a sum has only one order."""
        return self.restarted and self.world_size > 2 and self._tracked.rebuilds_buckets

    def restore(self) -> int:
        """Put the state of the commit to resume from back. Returns the number of steps that it had finished."""
        assert self._link is not None
        resume = self._link.boot.resume
        if resume is None:
            return 0
        checkpoint = Checkpoint.open(open_storage(self._link.boot.run_dir), resume.attempt.path, resume.manifest_sha256)
        self._hold_arena(checkpoint, resume.attempt)
        source = self.rank if self.rank < checkpoint.world_size else 0
        self._tracked.restore(checkpoint, self.rank, source)
        plain: Any = checkpoint.plain(source)
        if len(plain["batches"]) != len(self._batches):
            raise UsageError(
                f"the checkpoint has {len(plain['batches'])} run.batches(…), this script makes {len(self._batches)}"
            )
        for batches, position in zip(self._batches, plain["batches"], strict=True):
            batches.restore(position)
            batches.prepare()
        random_state.restore(plain["random"])
        if source != self.rank:
            random_state.diverge(self.rank)
        return resume.attempt.step

    def _hold_arena(self, checkpoint: Checkpoint, attempt: Attempt) -> None:
        """Let the checkpoint take from memory what an earlier process of this node sealed there for it."""
        assert self._link is not None
        arena = self._link.arena
        for slot in range(arena.slots):
            with contextlib.suppress(CorruptCheckpoint):  # then it is read from storage
                sealed = decode_index(arena.read_index(slot), f"slot {slot} of the arena", sealed=True)
                if sealed.attempt == attempt and sealed.world_size == checkpoint.world_size:
                    checkpoint.hold(sealed.rank, sealed, arena.image(slot))

    def _capture(self) -> tuple[list[TensorItem], dict[str, object]]:
        """Everything tracked, at this boundary."""
        part = self._tracked.collect()
        positions = [batches.state() for batches in self._batches]
        return part.items, {"tracked": part.plain, "random": random_state.capture(), "batches": positions}

    def _make_group(self) -> Store:
        loopback = self._link.boot.loopback if self._link else False
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if self._link is None and self.world_size == 1:
            loopback = True
        process_group.register(self.generation, loopback, self._link.collective if self._link else None)
        if self._link is None and self.world_size == 1:
            store: Store = dist.HashStore()
        elif self._link is None:
            dist.init_process_group(process_group.BACKEND, timeout=GROUP_TIMEOUT)
            process_group.destroy_at_exit()
            return dist.HashStore()
        else:
            if host is None or port is None:
                raise UsageError("MASTER_ADDR and MASTER_PORT are gone from the environment; the launcher had set them")
            store = TCPStore(host, int(port), None, is_master=False, wait_for_workers=False, timeout=GROUP_TIMEOUT)
        dist.init_process_group(
            process_group.BACKEND,
            store=PrefixStore("ftrain/group", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=GROUP_TIMEOUT,
        )
        process_group.destroy_at_exit()
        return PrefixStore(f"ftrain/exchange/{self.generation}", store)


class Steps:
    """The training loop: an iterator of `Step`s that takes the snapshots at their boundaries."""

    def __init__(self, run: Run, total: int | None) -> None:
        self._run = run
        self._link = run.link
        self._total = total
        self._done = 0  # steps finished
        self._began = False  # the state is restored, the real steps have begun
        self._rehearsed = False
        self._open: Step | None = None
        self._attempt_seen = 0
        self._metrics: tuple[int, dict[str, Any]] | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._open is not None:
            self.finish(self._open)
        if not self._began:
            if self._run.must_rehearse and not self._rehearsed:
                self._rehearsed = True
                return self._rehearsal()
            self._began = True
            self._begin()
        if self._total is not None and self._done >= self._total:
            self._end()
            raise StopIteration
        if self._link is not None:
            self._link.enter(Phase.STEP)
        self._open = Step.of(self, self._done)
        return self._open

    def finish(self, step: Step) -> None:
        """The boundary after `step`: the one place where a snapshot is taken."""
        if self._open is not step:
            return
        self._open = None
        if not self._began:
            return  # a rehearsal leaves no trace: what it changed is restored next
        self._done += 1
        if self._link is None:
            return
        if self._run.snapshots is not None:
            self._run.snapshots.prepare()
        armed = self._link.finished(self._done)
        if armed is not None:
            self._snapshot(armed)

    def give_up(self, step: Step) -> None:
        """The step failed: it is not done. A script that goes on all the same gets it again."""
        if self._open is step:
            self._open = None

    def log(self, step: Step, values: dict[str, Any]) -> None:
        if not self._began:
            return
        if self._metrics is not None and self._metrics[0] == step.number:
            values = {**self._metrics[1], **values}
        else:
            # Those of an earlier step: their tensors are ready by now, so that reading them waits for nothing.
            self._send_metrics()
        self._metrics = (step.number, values)

    def _rehearsal(self) -> Step:
        """The step to go on from, once before the state is restored.

        DDP sums gradients in other buckets in its first iteration than in all later ones, so in another order: other
        bits. The run that never failed had its first iteration long ago, so a resumed one gets it over with before it
        counts.
        """
        assert self._link is not None and self._link.boot.resume is not None
        self._link.enter(Phase.RESTORING)
        self._open = Step.of(self, self._link.boot.resume.attempt.step)
        return self._open

    def _begin(self) -> None:
        if self._link is None:
            return
        started = time.monotonic()
        self._link.enter(Phase.RESTORING)
        self._done = self._run.restore()
        self._link.page.store(Field.TOTAL_STEPS, self._total or 0)
        self._link.page.store(Field.STEP, self._done)
        self._link.enter(Phase.STEP)
        self._link.say(local.WorkerLooping(self._done, self._total or 0, time.monotonic() - started))

    def _snapshot(self, armed: Armed) -> None:
        """A snapshot that fails is not a failure of the training: the attempt is given up, the steps go on."""
        assert self._link is not None and self._run.snapshots is not None
        number = armed.attempt.number
        self._attempt_seen = number
        self._link.enter(Phase.SNAPSHOT)
        self._run.snapshots.take(armed)
        if armed.hold:
            self._run.snapshots.wait()
            self._link.hold(number)

    def _end(self) -> None:
        """All steps are done: the last state is committed before the script goes on."""
        if self._link is None:
            return
        self._send_metrics()
        snapshots = self._run.snapshots
        if snapshots is not None and self._done:
            snapshots.wait()
            self._link.say(local.WorkerAtEnd(self._done))
            while armed := self._link.wait_armed(self._done, self._attempt_seen):
                self._snapshot(armed)
                snapshots.wait()
        self._link.enter(Phase.DONE)

    def _send_metrics(self) -> None:
        if self._metrics is None or self._link is None:
            return
        step, values = self._metrics
        self._metrics = None
        if self._run.rank == 0:
            self._link.say(local.WorkerMetrics(step, {name: _number(value) for name, value in values.items()}))


class Step(int):
    """One step: the number of steps before it, and a context manager."""

    _steps: Steps

    @classmethod
    def of(cls, steps: Steps, number: int) -> Step:
        step = cls(number)
        step._steps = steps
        return step

    @property
    def number(self) -> int:
        """Counts from 0 at the beginning of the run, not of this process."""
        return int(self)

    def log(self, **values: float | torch.Tensor) -> None:
        """Report metrics: numbers, or tensors of one element, read a step later so as not to wait for the device."""
        self._steps.log(self, {name: _kept(name, value) for name, value in values.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, found: TracebackType | None
    ) -> None:
        if kind is None:
            self._steps.finish(self)
        else:
            self._steps.give_up(self)


def _kept(name: str, value: float | torch.Tensor) -> float | torch.Tensor:
    """The value as it is now: a tensor on a device is read later, one in memory costs nothing to read."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise UsageError(f"step.log({name}=…): has {value.numel()} elements of {value.dtype}; give one real number")
        return value.item() if value.device.type == "cpu" else value.detach().clone()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"step.log({name}=…): a {type(value).__name__} is no number; give one, or a tensor of one"
        ) from None


def _number(value: float | torch.Tensor) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)

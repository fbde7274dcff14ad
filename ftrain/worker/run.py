"""A run as its training script sees it: join, track, batches, steps."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.checkpoint.wire import gather_bytes
from ftrain.core import local
from ftrain.core.manifest import decode_index
from ftrain.core.messages import Attempt, Resume
from ftrain.core.page import Phase
from ftrain.errors import CorruptCheckpoint, UsageError
from ftrain.storage import open_storage
from ftrain.worker import known_forms, process_group, random_state
from ftrain.worker.boundary import Boundary
from ftrain.worker.data import Batches
from ftrain.worker.link import Link, from_environment, leave_signals_to_agent
from ftrain.worker.loaders import shelter
from ftrain.worker.recovery import Recovery
from ftrain.worker.snapshots import Snapshots
from ftrain.worker.steps import Steps

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
        self._tracked = Tracked()
        self._batches: list[Batches] = []
        self._steps: Steps | None = None
        self._snapshots = (
            Snapshots(link, self._capture, lambda: self._tracked.replays) if link and link.boot.checkpoints else None
        )
        store = self._make_group()
        if self._snapshots is not None:
            self._snapshots.meet(store)

    @property
    def generation(self) -> int:
        """Counts up with every failure of the run."""
        return self._link.generation if self._link is not None else 1

    @property
    def restarted(self) -> bool:
        """Whether this process goes on from what others did before it."""
        boot = self._link.boot if self._link is not None else None
        return boot is not None and (boot.resume is not None or boot.line is not None)

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
        if self._link is not None:
            shelter(loader)
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

    def allow(self, seconds: float) -> contextlib.AbstractContextManager[object]:
        """Say that this rank may be quiet for so many seconds from now: until then nothing takes it for hung.

        As a context manager it ends with its block; otherwise with its time, or with the next call. Raises `UsageError`
        for what is no number of seconds.
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise UsageError(f"allow({seconds}): give the seconds that this rank may be quiet for, 0 to end it")
        block = contextlib.ExitStack()
        if self._link is not None:
            before = self._link.allow(time.monotonic_ns() + int(seconds * 1e9))
            block.callback(self._link.allow, before)
        return block

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

    def recovery(self) -> Recovery | None:
        """None where the run cannot go on in place."""
        if self._link is None or self._snapshots is None:
            return None
        boundary = Boundary(self._tracked, self._batches)
        return Recovery(self._link, self._tracked, boundary, self.restore, self.take_plain)

    def meeting(self) -> Store:
        """The store of the generation that this process was started for."""
        return self.store(*master())

    def store(self, address: str, port: int) -> Store:
        """The store at this address."""
        return TCPStore(address, port, None, is_master=False, wait_for_workers=False, timeout=GROUP_TIMEOUT)

    def restore(self, resume: Resume | None) -> int:
        """Put the state of a commit back. Returns the number of steps that it had finished."""
        assert self._link is not None
        if resume is None:
            return 0
        origin = resume.origin
        where, path = (origin.url, origin.path) if origin else (self._link.boot.storage, resume.attempt.path)
        checkpoint = Checkpoint.open(open_storage(where), path, resume.manifest_sha256)
        if origin is not None and origin.weights_only:
            self._tracked.restore_modules(checkpoint, self.rank)
            return resume.attempt.step
        self._hold_arena(checkpoint, resume.attempt)
        source = self.rank if self.rank < checkpoint.world_size else 0
        with self._tracked.own_options() if origin is not None and origin.own_options else contextlib.nullcontext():
            self._tracked.restore(checkpoint, self.rank, source, gather_bytes if self.world_size > 1 else None)
        self.take_plain(checkpoint.plain(source))
        if source != self.rank:
            random_state.diverge(self.rank)
        return resume.attempt.step

    def take_plain(self, plain: dict[str, Any]) -> None:
        """Put back what a snapshot has beside what is tracked."""
        if len(plain["batches"]) != len(self._batches):
            raise UsageError(
                f"the checkpoint has {len(plain['batches'])} run.batches(…), this script makes {len(self._batches)}"
            )
        for batches, position in zip(self._batches, plain["batches"], strict=True):
            batches.restore(position)
            batches.prepare()
        random_state.restore(plain["random"])

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
        """The default group. Returns where ranks meet to plan snapshots."""
        link = self._link
        loopback = link.boot.loopback if link else self.world_size == 1
        # Others are alive, and stand still until this process has come as far as they have.
        alone = link is not None and link.boot.line is not None
        process_group.register(self.generation, loopback, link.collective if link else None, alone)
        if alone:
            known_forms.use()
        if link is None and self.world_size > 1:
            dist.init_process_group(process_group.BACKEND, timeout=GROUP_TIMEOUT)
            process_group.destroy_at_exit()
            return dist.HashStore()
        store: Store = dist.HashStore() if link is None or alone else self.meeting()
        dist.init_process_group(
            process_group.BACKEND,
            store=PrefixStore("ftrain/group", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=GROUP_TIMEOUT,
        )
        process_group.destroy_at_exit()
        return PrefixStore(f"ftrain/exchange/{self.generation}", store)


def master() -> tuple[str, int]:
    """Where the store is, as the launcher has set it."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        raise UsageError("MASTER_ADDR and MASTER_PORT are gone from the environment; the launcher had set them")
    return host, int(port)

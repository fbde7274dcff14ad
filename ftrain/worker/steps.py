"""The training loop: steps, their boundaries, and what happens when one is lost.

next ──► step ──► finish: boundary ──► next …
          └─ a peer is lost ──► halt ──► (replay) ──► meet, come to the line ──► next …
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from ftrain.core import local
from ftrain.core.messages import Resume
from ftrain.core.page import Phase
from ftrain.errors import PeerLost, UsageError
from ftrain.worker import standing_optimizers
from ftrain.worker.link import Armed

if TYPE_CHECKING:
    from ftrain.worker.recovery import Coming, Recovery
    from ftrain.worker.run import Run


class Steps:
    """An iterator of `Step`s that takes the snapshots at their boundaries."""

    def __init__(self, run: Run, total: int | None) -> None:
        self._run = run
        self._link = run.link
        self._recovery = run.recovery()
        self._total = total
        self._done = 0  # steps finished
        self._counts = False  # the state is restored: steps are real ones
        self._rehearsed = False
        self._lost = False  # a peer: the state has to be brought to a line first
        self._coming: Coming | None = None  # the generation that this rank is on its way into
        self._iterated = False  # this process has done a step
        self._resume: Resume | None = self._link.boot.resume if self._link is not None else None
        self._open: Step | None = None
        self._attempt_seen = 0
        self._metrics: tuple[int, dict[str, Any]] | None = None
        self._arrives = self._link is not None and self._link.boot.line is not None  # where others are alive

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        while True:
            try:
                step = self._next()
            except Exception as error:
                if not self.lose(error):
                    raise
            else:
                if step is None:
                    raise StopIteration
                return step

    def _next(self) -> Step | None:
        if self._open is not None:
            self.finish(self._open)
        if self._lost or self._is_revoked:
            self._halt()
        if self._arrives and self._recovery is not None:
            self._arrive(self._recovery)
        if self._coming is not None and (step := self._come(self._coming)) is not None:
            return step
        if not self._counts:
            if self._run.must_rehearse and not self._rehearsed:
                self._rehearsed = True
                assert self._resume is not None
                return self._alone(self._resume.attempt.step)
            self._begin()
        if self._total is not None and self._done >= self._total:
            self._end()
            return None
        if self._link is not None:
            self._link.enter(Phase.STEP)
        self._open = Step.of(self, self._done)
        return self._open

    def finish(self, step: Step) -> None:
        """The boundary after `step`: the one place where a snapshot is taken."""
        if self._open is not step:
            return
        self._open = None
        if not self._counts:
            standing_optimizers.stand(False)
            # A step done alone leaves no trace but what it was done for: all else is brought to the line next.
            if self._coming is not None and self._recovery is not None:
                self._recovery.did_replay()
            self._iterated = True
            return
        self._done += 1
        step._finished = True
        self._iterated = True
        if self._link is None:
            return
        if self._recovery is not None:
            self._recovery.reached(self._done)
        if self._run.snapshots is not None:
            self._run.snapshots.prepare()
        armed = self._link.finished(self._done)
        if armed is not None:
            self._snapshot(armed)

    def give_up(self, step: Step) -> None:
        """The step failed: it is not done. A script that goes on all the same gets it again."""
        if self._open is step:
            self._open = None
            standing_optimizers.stand(False)

    def lose(self, error: BaseException) -> bool:
        """Whether `error` came of a lost peer, so that this rank can go on in place in the next generation."""
        if self._recovery is None or not self._recovery.is_lost_peer(error):
            return False
        self._open = None
        self._lost = True
        standing_optimizers.stand(False)
        return True

    def log(self, step: Step, values: dict[str, Any]) -> None:
        if not self._counts:
            return
        if self._metrics is not None and self._metrics[0] == step.number:
            values = {**self._metrics[1], **values}
        else:
            # Those of an earlier step: their tensors are ready by now, so that reading them waits for nothing.
            self._send_metrics()
        self._metrics = (step.number, values)

    @property
    def _is_revoked(self) -> bool:
        return self._recovery is not None and self._link is not None and self._link.revoked

    def _halt(self) -> None:
        """Stand still until there is a generation to go on in."""
        assert self._recovery is not None
        self._counts, self._coming, self._metrics = False, None, None
        if self._run.snapshots is not None:
            self._run.snapshots.wait()  # what is being copied is still the state of its boundary
        recover = self._recovery.halt(first_step=not self._iterated)
        self._lost = False
        self._resume = recover.resume
        store = self._run.store(recover.master_address, recover.master_port)
        self._coming = self._recovery.survivor(recover.line, store)

    def _arrive(self, recovery: Recovery) -> None:
        assert self._link is not None and self._link.boot.line is not None
        self._coming = recovery.newcomer(self._link.boot.line, self._run.meeting())
        self._arrives = False

    def _come(self, coming: Coming) -> Step | None:
        """On the way into a generation: the step to do alone first, or None when this rank has come to the line."""
        assert self._recovery is not None and self._link is not None
        if coming.replays and not coming.began:
            coming.began = True
            self._recovery.prepare_replay(coming)
            return self._alone(coming.line.step - 1)
        began = time.monotonic()
        self._link.enter(Phase.RESTORING)
        self._lost = True  # until everything is there
        exchange = self._recovery.bring(coming, self._resume)
        self._lost, self._coming = False, None
        if self._run.snapshots is not None:
            self._run.snapshots.meet(exchange)
        self._loops(coming.line.step, began)
        return None

    def _alone(self, number: int) -> Step:
        """A step that does not count: done before the state is there.

        It replays what is private to this rank, or it is a rehearsal: DDP sums gradients in other buckets in its first
        iteration than in all later ones, so in another order: other bits. The run that never failed had its first
        iteration long ago, so where all ranks are new they get it over with before it counts.
        """
        assert self._link is not None
        self._link.enter(Phase.RESTORING)
        standing_optimizers.stand(True)
        self._open = Step.of(self, number)
        return self._open

    def _begin(self) -> None:
        """All ranks are new: restore the newest commit."""
        if self._link is None:
            self._counts = True
            return
        began = time.monotonic()
        self._link.enter(Phase.RESTORING)
        step = self._run.restore(self._resume)
        if self._recovery is not None:
            self._recovery.reached(step)
        self._loops(step, began)

    def _loops(self, step: int, began: float) -> None:
        assert self._link is not None
        self._done, self._counts = step, True
        self._link.loops(step, self._total or 0)
        seconds = time.monotonic() - began
        self._link.say(local.WorkerLooping(step, self._total or 0, seconds, self._link.generation))

    def _snapshot(self, armed: Armed) -> None:
        """A snapshot that fails is not a failure of the training: the attempt is given up, the steps go on."""
        assert self._link is not None and self._run.snapshots is not None
        number = armed.attempt.number
        self._attempt_seen = number
        self._link.enter(Phase.SNAPSHOT)
        self._run.snapshots.take(armed, self._telling())
        if armed.hold:
            self._run.snapshots.wait()
            self._link.hold(armed.attempt)

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
            if self._is_revoked:
                raise PeerLost(f"generation {self._link.generation} ended while the last state was being committed")
        self._link.enter(Phase.DONE)

    def _send_metrics(self) -> None:
        self._telling()()

    def _telling(self) -> Callable[[], None]:
        """What was logged last, for somebody to tell the agent. Tensors on a device are waited for then."""
        metrics, self._metrics = self._metrics, None
        link = self._link

        def tell() -> None:
            if metrics is not None and link is not None and self._run.rank == 0:
                step, values = metrics
                link.say(local.WorkerMetrics(step, {name: _number(value) for name, value in values.items()}))

        return tell


class Step(int):
    """One step: the number of steps before it, and a context manager."""

    _steps: Steps
    _finished = False

    @classmethod
    def of(cls, steps: Steps, number: int) -> Step:
        step = cls(number)
        step._steps = steps
        return step

    @property
    def number(self) -> int:
        """Counts from 0 at the beginning of the run, not of this process."""
        return int(self)

    @property
    def done(self) -> bool:
        """Whether this step was finished and counts: to be asked by what follows `with step` in the loop.

        False after a step that lost a peer, and after one that was only repeated to get back to where the others are.
        """
        return self._finished

    def log(self, **values: float | torch.Tensor) -> None:
        """Report metrics: numbers, or tensors of one element, read a step later so as not to wait for the device."""
        self._steps.log(self, {name: _kept(name, value) for name, value in values.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, found: TracebackType | None
    ) -> bool:
        """A step that lost a peer ends without an exception: the loop goes round, and does it again."""
        del kind, found
        if error is None:
            try:
                self._steps.finish(self)
            except Exception as lost:
                if not self._steps.lose(lost):
                    raise
            return False
        if self._steps.lose(error):
            return True
        self._steps.give_up(self)
        return False


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

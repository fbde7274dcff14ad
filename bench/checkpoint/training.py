"""A training loop to save from: matrix products, an all-reduce between ranks, an optimizer that writes all state."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from states import State, digest
from subjects import Pending, Saver

MATRIX_SIZE = 384
GRADIENT_ELEMENTS = 1 << 20
PLAIN_STEPS = 3


class Touch(torch.optim.Optimizer):
    """Adds a little to every tensor of the state, and notes when it was let in."""

    def __init__(self, state: State) -> None:
        super().__init__(list(state.values()), {})
        self.entered = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        del closure  # there is no loss
        self.entered = time.perf_counter()
        torch._foreach_add_(self.param_groups[0]["params"], 1e-3)


class Trainer:
    """One rank's loop: `matmuls` products a step."""

    def __init__(self, saver: Saver, state: State, ranks: int, matmuls: int) -> None:
        self.saver = saver
        self.state = state
        self.ranks = ranks
        self.matmuls = matmuls
        self.optimizer = Touch(state)
        self.pending: Pending | None = None
        self.own_waits: list[float] = []  # of the optimizer, in steps in which there is nothing to wait for
        self.optimizer.register_step_pre_hook(self._wait)
        self._factors = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE)
        self._product = torch.empty(MATRIX_SIZE, MATRIX_SIZE)
        self._gradient = torch.zeros(GRADIENT_ELEMENTS if ranks > 1 else 1)

    def begin(self, path: Path) -> float:
        """Begin a save; the seconds until the call is back."""
        began = time.perf_counter()
        self.pending = self.saver.begin(path, self.state)
        return time.perf_counter() - began

    def finish(self) -> None:
        """Wait for the save that has begun; every rank has it when this returns."""
        assert self.pending is not None
        self.pending.result()
        self.pending = None
        self.barrier()

    def compute(self) -> None:
        for _ in range(self.matmuls):
            torch.mm(self._factors[0], self._factors[1], out=self._product)

    def agree(self, busy: bool) -> bool:
        """The all-reduce of a step; whether any rank said that it is busy."""
        self._gradient[0] = float(busy)
        if self.ranks > 1:
            dist.all_reduce(self._gradient)
        return bool(self._gradient[0] > 0)

    def write(self) -> float:
        """The optimizer's step; the seconds that it had to wait before it could begin."""
        began = time.perf_counter()
        self.optimizer.step()
        return self.optimizer.entered - began

    def plain_step(self) -> float:
        began = time.perf_counter()
        self.compute()
        self.agree(False)
        self.own_waits.append(self.write())
        return time.perf_counter() - began

    def barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    def _wait(self, *_: object) -> None:
        if self.pending is not None:
            self.pending.before_step()


def stall(trainer: Trainer, path: Path, check: bool) -> dict[str, Any]:
    """A save that is not counted, one with nothing to overlap, and one that overlaps the compute phase of a step.

    A stall is the time in the call and in the optimizer's wait. `check` loads the last save and compares it with what
    the state was when it was called.
    """
    trainer.begin(path / "first")
    trainer.write()
    trainer.finish()
    plain = statistics.median(trainer.plain_step() for _ in range(PLAIN_STEPS))
    own_wait = statistics.median(trainer.own_waits)  # what torch itself takes between the call and the optimizer
    trainer.barrier()
    idle_began = time.perf_counter()
    idle_call = trainer.begin(path / "idle")
    idle_wait = trainer.write() - own_wait
    trainer.finish()
    saved = time.perf_counter() - idle_began

    before = digest(trainer.state) if check else 0
    trainer.barrier()
    began = time.perf_counter()
    call = trainer.begin(path / "overlap")
    trainer.compute()
    trainer.agree(False)
    wait = trainer.write() - own_wait
    step = time.perf_counter() - began
    trainer.finish()
    if check:
        trainer.saver.load(path / "overlap", trainer.state)
        if digest(trainer.state) != before:
            raise ValueError("what the asynchronous save holds is not what the state was when it was called")
    return {
        "idle_call": idle_call,
        "idle_wait": idle_wait,
        "idle_saved": saved,
        "overlap_call": call,
        "overlap_wait": wait,
        "overlap_step": step,
        "plain_step": plain,
    }


def train(trainer: Trainer, path: Path, steps: int) -> dict[str, Any]:
    """A save that is not counted, `steps` steps without one, then a save and all steps until all ranks have it.

    The call is part of the first step of the second series.
    """
    trainer.begin(path / "first")
    trainer.write()
    trainer.finish()
    plain = [trainer.plain_step() for _ in range(steps)]
    trainer.barrier()
    saving: list[float] = []
    busy = True
    while busy:
        began = time.perf_counter()
        if trainer.pending is None:
            trainer.begin(path / "series")
        trainer.compute()
        assert trainer.pending is not None
        busy = trainer.agree(not trainer.pending.done())
        trainer.write()
        saving.append(time.perf_counter() - began)
    trainer.finish()
    return {"plain": plain, "saving": saving}


def matmuls_per_second() -> float:
    """How many of a step's products one thread makes in a second here and now."""
    factors = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE)
    product = torch.empty(MATRIX_SIZE, MATRIX_SIZE)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < 0.3:
        torch.mm(factors[0], factors[1], out=product)
        count += 1
    return count / (time.perf_counter() - began)

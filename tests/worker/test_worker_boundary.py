"""A step that failed is rolled back and done again: what follows is bitwise what would have followed."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ftrain.checkpoint.state import own_buffers
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.errors import MismatchedState, NotPlainData
from ftrain.worker import boundary as boundary_module
from ftrain.worker import random_state
from ftrain.worker.boundary import Boundary
from ftrain.worker.data import Batches
from ftrain.worker.packing import pack, unpack


class Extra(nn.Module):
    """Keeps state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * (1 + 1 / self.calls)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Mean:
    """A metric: an object with a tensor and a tuple in its state."""

    def __init__(self) -> None:
        self.total, self.seen = torch.zeros(2), (0, 1.5)

    def add(self, loss: torch.Tensor) -> None:
        self.total += loss.detach()
        self.seen = (self.seen[0] + 1, self.seen[1])

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert type(state["seen"]) is tuple
        self.total, self.seen = state["total"].clone(), state["seen"]


class Training:
    """A rank's script: everything that may be tracked."""

    def __init__(self, processes: int = 0, seed: int = 1, kind: Callable[..., Any] = torch.optim.AdamW) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), Extra(), nn.Linear(8, 1))
        self.optimizer = kind(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.mean = Mean()
        loader = DataLoader([float(i) for i in range(20)], 4, shuffle=True, num_workers=processes)
        self.batches = Batches(loader, "batches 0", 1)
        self.tracked = Tracked()
        for name in ("model", "optimizer", "scheduler", "mean"):
            self.tracked.add(name, getattr(self, name))
        self.boundary = Boundary(self.tracked, [self.batches])

    def forward(self) -> torch.Tensor:
        batch = next(self.batches).float()
        noise = random.random() + np.random.rand() + np.random.randn()
        loss = (self.model(batch.view(-1, 1)) * noise).square().mean()
        self.mean.add(loss)
        loss.backward()
        return loss

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.forward()
        self.optimizer.step()
        self.scheduler.step()

    def fail(self) -> None:
        """A step that comes as far as the optimizer, and further in its bookkeeping."""
        self.forward()
        self.scheduler.last_epoch += 1
        self.optimizer.param_groups[0]["lr"] = 0.0

    def everything(self) -> list[Any]:
        state = copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict(), self.mean.state_dict()])
        rest = [self.scheduler.state_dict(), random.getstate(), torch.get_rng_state(), np.random.get_state()]
        return [*state, *copy.deepcopy(rest), self.batches.state()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(one, b[key]) for key, one in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def captured(boundary: Boundary) -> bytes:
    data = boundary.capture()
    assert data is not None
    return data


@pytest.mark.parametrize("processes", [0, 1])
def test_steps_that_fail_once_each_leave_no_trace(processes: int) -> None:
    unhurt = Training(processes)
    for _ in range(9):
        unhurt.step()
    expected = unhurt.everything()
    hurt = Training(processes)
    for _ in range(9):
        data = captured(hurt.boundary)
        hurt.fail()
        assert hurt.boundary.live()
        hurt.boundary.roll_back(data)
        hurt.boundary.capture()
        hurt.step()
        assert not hurt.boundary.live()
    assert same(hurt.everything(), expected)


@pytest.mark.parametrize("before", [0, 1, 7])
def test_successor_with_the_shared_state_goes_on_as_its_predecessor(before: int) -> None:
    dead = Training()
    for _ in range(before):
        dead.step()
    data = captured(dead.boundary)
    parameters = copy.deepcopy(list(dead.model.parameters()))
    shared = copy.deepcopy(dead.optimizer.state_dict()["state"])
    for _ in range(4):
        dead.step()
    expected = dead.everything()
    successor = Training(seed=2)
    successor.step()  # rehearsed
    with torch.no_grad():
        for one, other in zip(successor.model.parameters(), parameters, strict=True):
            one.copy_(other)
    group = successor.optimizer.state_dict()["param_groups"]
    successor.optimizer.load_state_dict({"state": shared, "param_groups": group})
    if not before:  # then the buffers are those of the beginning, which all share
        successor.model[1].reset_running_stats()
    successor.boundary.roll_back(data)
    for _ in range(4):
        successor.boundary.capture()
        successor.step()
    assert same(successor.everything(), expected)


def test_rank_that_was_a_step_ahead_goes_back_to_the_boundary_before() -> None:
    training = Training()
    data = captured(training.boundary)  # before BatchNorm's statistics have ever changed
    before = training.everything()
    training.fail()
    training.boundary.capture()
    training.fail()
    training.boundary.roll_back(data)
    assert same(training.everything(), before)


def test_state_is_live_until_something_shared_is_written() -> None:
    training = Training()
    training.step()
    training.boundary.capture()
    assert training.boundary.live()
    with torch.no_grad():
        next(training.model.parameters()).mul_(1.0)
    assert not training.boundary.live()
    training.boundary.capture()
    assert training.boundary.live()
    state = training.optimizer.state[training.model[0].weight]
    state["exp_avg"].add_(1)
    assert not training.boundary.live()


def test_optimizer_that_fails_in_its_step_leaves_nothing_live() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            del closure
            raise RuntimeError("in the middle")

    training = Training(kind=Failing)
    training.boundary.capture()
    training.forward()
    with pytest.raises(RuntimeError, match="middle"):
        training.optimizer.step()
    assert not training.boundary.live()


def test_state_that_an_optimizer_makes_in_its_first_step_is_watched_from_then_on() -> None:
    training = Training(kind=lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9))
    training.boundary.capture()
    training.step()
    training.boundary.capture()
    training.optimizer.state[training.model[0].weight]["momentum_buffer"].zero_()
    assert not training.boundary.live()


def test_of_thousands_of_tensors_a_sample_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_module, "WATCHED_MAX", 3)
    training = Training()
    training.step()
    training.boundary.capture()
    assert training.boundary.live()
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.mul_(1.0)
    assert not training.boundary.live()


def test_constant_buffer_that_the_failed_step_changes_is_as_it_was() -> None:
    training = Training()
    data = captured(training.boundary)
    training.model.eval()
    training.forward()
    training.model.train()
    training.forward()  # does not count what it writes to running_mean
    assert training.model[1].running_mean.any()  # type: ignore[union-attr,operator]
    assert training.boundary.live()
    training.boundary.roll_back(data)
    assert training.model[1].running_mean.tolist() == [0.0] * 8  # type: ignore[union-attr,operator]


def test_constant_buffer_too_large_to_be_kept_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_buffers, "KEPT_BYTES_MAX", 40)
    training = Training()
    training.boundary.capture()
    training.model[1].running_var.fill_(7)  # type: ignore[union-attr,operator]
    assert not training.boundary.live()
    assert b"running_var" in captured(training.boundary)  # it is this rank's own from now on
    training.model[1].running_var.fill_(8)  # type: ignore[union-attr,operator]
    assert training.boundary.live()


def test_private_tensors_beyond_the_bound_leave_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_module, "PRIVATE_BYTES_MAX", 8)
    training = Training()
    assert training.boundary.capture() is not None
    training.step()
    assert training.boundary.capture() is None
    assert training.boundary.live()


def test_optimizer_options_and_tensor_learning_rates_go_back() -> None:
    training = Training(kind=lambda params, lr: torch.optim.AdamW(params, torch.tensor(lr), capturable=False))
    training.step()
    data = captured(training.boundary)
    group = training.optimizer.param_groups[0]
    before = (float(group["lr"]), group["betas"])
    group["lr"].fill_(9)
    group["betas"] = (0.1, 0.2)
    training.boundary.roll_back(data)
    assert (float(group["lr"]), group["betas"]) == before
    assert isinstance(group["lr"], torch.Tensor)


def test_record_of_other_objects_is_refused() -> None:
    training = Training()
    data = captured(training.boundary)
    training.tracked.add("more", Mean())
    with pytest.raises(MismatchedState, match="was tracked, and now"):
        training.boundary.roll_back(data)
    with pytest.raises(MismatchedState, match="makes 0"):
        Boundary(training.tracked, []).roll_back(data)


def test_state_that_is_no_plain_data_leaves_no_record_and_training_alone() -> None:
    class Odd(Mean):
        def state_dict(self) -> dict[str, Any]:
            return {"deep": [{1, 2}]}

    training = Training()
    training.tracked.add("odd", Odd())
    assert training.boundary.capture() is None
    lbfgs = Training(kind=torch.optim.LBFGS)  # its state becomes lists of tensors
    assert lbfgs.boundary.capture() is not None
    lbfgs.optimizer.step(lambda: lbfgs.model(torch.ones(4, 1)).square().mean())
    lbfgs.optimizer.state[lbfgs.model[0].weight]["old_dirs"] = [torch.ones(2)]
    assert lbfgs.boundary.capture() is None


def test_normal_number_that_numpy_keeps_for_the_next_call_is_part_of_the_state() -> None:
    np.random.seed(4)
    np.random.randn()
    keeping = random_state.capture()
    kept = np.random.randn()  # gives away what is kept, and draws nothing
    given_away = random_state.capture()
    following = np.random.randn()
    random_state.restore(keeping)
    assert np.random.randn() == kept
    random_state.restore(given_away)
    assert np.random.randn() == following


def test_plain_data_comes_back_as_it_was() -> None:
    values = [
        None, True, 1, 1.0, -0.0, math.inf, 1 << 70, -(1 << 63), (1 << 64) - 1, -(1 << 90), "s", "\u2713", b"\0b",
        [], (), {}, (1, [2, (3,)]), {"a": (1,)}, {1: "x", (2, 3): [4], None: ()}, {"$": 1},
    ]  # fmt: skip
    assert same(unpack(pack(values, "test")), values)
    assert math.copysign(1, unpack(pack(-0.0, "test"))) == -1
    assert math.isnan(unpack(pack(math.nan, "test")))
    with pytest.raises(NotPlainData, match=r"test\[1\]\.k"):
        pack([1, {"k": {1}}], "test")

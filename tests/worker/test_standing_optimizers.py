"""A step that is done alone leaves torch's optimizers as they were, and everybody else's to themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from ftrain.worker import standing_optimizers


class Noisy(torch.optim.SGD):
    """Takes random numbers, which a step that is done again has to take too."""

    def step(self, *_: object) -> None:  # type: ignore[override]
        super().step()
        torch.rand(1)


@pytest.fixture(autouse=True)
def moves_again() -> Iterator[None]:
    yield
    standing_optimizers.stand(False)


def parameter() -> torch.nn.Parameter:
    found = torch.nn.Parameter(torch.ones(3))
    found.grad = torch.ones(3)
    return found


def moved(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step changes its parameters."""
    before = [one.detach().clone() for group in optimizer.param_groups for one in group["params"]]
    optimizer.step()
    after = [one.detach() for group in optimizer.param_groups for one in group["params"]]
    return not all(map(torch.equal, before, after))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_optimizer_stands_still_and_moves_again(kind: type[torch.optim.Optimizer]) -> None:
    first, second = parameter(), parameter()
    optimizer = kind([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)  # type: ignore[call-arg]
    lists = [group["params"] for group in optimizer.param_groups]
    standing_optimizers.stand(True)
    assert not moved(optimizer)
    assert [id(group["params"]) for group in optimizer.param_groups] == [id(one) for one in lists]
    assert lists == [[first], [second]]
    assert first.grad is not None
    standing_optimizers.stand(False)
    assert moved(optimizer)


def test_schedulers_and_scalers_go_on() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1)).detach()
    standing_optimizers.stand(True)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5]
    assert torch.equal(optimizer.param_groups[0]["params"][0].detach(), torch.ones(3))


def test_what_is_not_known_does_its_step() -> None:
    standing_optimizers.stand(True)
    assert moved(Noisy([parameter()], lr=0.1))
    hooked = torch.optim.SGD([parameter()], lr=0.1)
    seen: list[int] = []
    hooked.register_step_post_hook(lambda one, *_: seen.append(len(one.param_groups[0]["params"])))
    assert moved(hooked)
    assert seen == [1]
    given = torch.optim.SGD([parameter()], lr=0.1)
    given.step(lambda: 1.0)
    assert not torch.equal(given.param_groups[0]["params"][0].detach(), torch.ones(3))


def test_parameters_come_back_after_an_exception() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("lost")

    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    standing_optimizers.stand(True)
    handle = torch_optimizer.register_optimizer_step_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="lost"):
            optimizer.step()
    finally:
        handle.remove()
    standing_optimizers.stand(False)
    assert len(optimizer.param_groups[0]["params"]) == 1
    assert moved(optimizer)

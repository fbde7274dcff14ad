"""`pin` and `unpin`, and the names by which `ftrain.load` finds a commit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ftrain
from ftrain.checkpoint.catalogue import catalogue, find
from ftrain.checkpoint.pins import pins
from ftrain.errors import CheckpointNotFound
from ftrain.storage import PosixStorage
from tests.tools.runs import ckpt, make_run, model, retire


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", {step: {"model": model(step)} for step in (5, 10, 15)})


def test_pinned_commit_outlives_retention_until_it_is_unpinned(run: Path) -> None:
    assert ckpt("pin", f"{run}@5", "first", "--why", "the paper's").code == 0
    assert ckpt("pin", f"{run}@5", "first", "--why", "the paper's").code == 0  # nothing is wrong with saying it twice
    assert ckpt("prune", run, "--keep", 1).code == 0
    assert find(f"{run}@first").step == 5
    assert ckpt("verify", f"{run}@first").code == 0
    assert [commit.step for commit in catalogue(str(run)).commits] == [5, 15]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000000000005", "step-000000000015"]
    assert ckpt("unpin", run, "first").code == 0
    assert pins(PosixStorage(run)) == {}
    assert ckpt("prune", run, "--keep", 1).code == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000000015"]


def test_retired_commit_that_a_pin_keeps_can_be_pinned_again_by_another_name_only(run: Path) -> None:
    assert ckpt("pin", f"{run}@5", "first").code == 0
    retire(run, 5)
    again = ckpt("pin", f"{run}@first", "first")
    assert (again.code, "pinned as 'first' already" in again.text) == (2, True)
    assert ckpt("pin", f"{run}@first", "second").code == 0
    assert set(pins(PosixStorage(run))) == {"first", "second"}


def test_wrong_pins_are_refused_and_leave_nothing(run: Path, tmp_path: Path) -> None:
    ftrain.save(tmp_path / "alone", {"model": model()})
    assert ckpt("pin", tmp_path / "alone", "name").code == 2
    assert "letter" in ckpt("pin", f"{run}@5", "../up").text
    assert ckpt("pin", f"{run}@5", "one").code == 0
    assert "taken" in ckpt("pin", f"{run}@10", "one").text
    refused = ckpt("unpin", run, "two")
    assert (refused.code, "its pins: one" in refused.text) == (2, True)
    assert set(pins(PosixStorage(run))) == {"one"}


@pytest.mark.parametrize(("which", "step"), [("5", 5), ("-2", 10), ("latest", 15), ("kept", 5)])
def test_load_takes_the_commit_that_is_named(run: Path, which: str, step: int) -> None:
    assert ckpt("pin", f"{run}@5", "kept").code == 0
    net = model(99)
    assert ftrain.load(f"{run}@{which}", {"model": net}).step == step
    assert torch.equal(net.state_dict()["0.weight"], model(step).state_dict()["0.weight"])


def test_load_of_a_step_that_is_not_there_names_those_that_are(run: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="5, 10, 15"):
        ftrain.load(f"{run}@7", {"model": model()})


def test_path_with_an_at_sign_is_that_path(run: Path, tmp_path: Path) -> None:
    ftrain.save(f"{run}@5", {"model": model(3)}, step=3)
    assert ftrain.load(f"{run}@5", {"model": model()}).step == 3

"""`fork` and `prune`: what a new run begins with, and what may be removed."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain.checkpoint.catalogue import catalogue, find
from ftrain.checkpoint.pins import pin, pins, unpin
from ftrain.checkpoint.retain import remove, sweep
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.checkpoint.tools import pinning
from ftrain.checkpoint.tools.fork import append, fork
from ftrain.core.journal import FinishBody, GenerationBody, Head, RetireBody
from ftrain.core.messages import Attempt
from ftrain.errors import AlreadyExists, CheckpointNotFound, Fenced, UsageError
from ftrain.storage import PosixStorage
from tests.tools.runs import ckpt, make_run, model, retire

STEPS = (5, 10, 15, 20)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", {step: {"model": model(step)} for step in STEPS})


def steps_of(run: Path) -> list[int]:
    return [commit.step for commit in catalogue(str(run)).commits]


def test_a_fork_holds_nothing_but_a_journal_that_names_the_commit(run: Path, tmp_path: Path) -> None:
    found = ckpt("fork", f"{run}@10", tmp_path / "new", "--weights-only", "--json")
    assert found.code == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["journal"]
    (commit,) = catalogue(str(tmp_path / "new")).commits
    assert (commit.step, commit.origin, commit.path) == (0, str(run), Attempt(1, 10, 1).path)
    assert ckpt("verify", tmp_path / "new").code == 0
    assert ckpt("diff", f"{run}@10", tmp_path / "new").code == 0
    net = model(99)
    ftrain.load(tmp_path / "new", {"model": net})
    assert torch.equal(net.state_dict()["0.weight"], model(10).state_dict()["0.weight"])


def test_a_fork_of_a_fork_names_the_run_that_has_the_files(run: Path, tmp_path: Path) -> None:
    assert ckpt("fork", f"{run}@10", tmp_path / "a", "--weights-only", "--step", "3").code == 0
    shutil.rmtree(run / "journal")  # whatever else becomes of it
    assert ckpt("fork", tmp_path / "a", tmp_path / "b", "--weights-only").code == 0
    assert find(str(tmp_path / "a")).step == 3
    assert find(str(tmp_path / "b")).url == str(run / Attempt(1, 10, 1).path)


def test_a_forked_commit_outlives_its_retirement(run: Path, tmp_path: Path) -> None:
    name = ckpt("fork", f"{run}@10", tmp_path / "new", "--weights-only", "--json").json["pin"]
    storage, path = PosixStorage(run), Attempt(1, 10, 1).path
    retire(run, 10)
    remove(storage, path)
    assert sweep(storage, [commit.path for commit in catalogue(str(run)).commits], 99) == []
    assert ckpt("verify", tmp_path / "new").code == 0
    unpin(storage, name)
    remove(storage, path)
    assert ckpt("verify", tmp_path / "new").code == 74


def test_a_commit_that_is_retired_while_it_is_forked_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(storage: PosixStorage, name: str, attempt: Attempt, why: str) -> None:
        pin(storage, name, attempt, why)
        retire(run, 10)

    monkeypatch.setattr(pinning, "pin", late)
    with pytest.raises(CheckpointNotFound, match="just been retired"):
        fork(f"{run}@10", str(tmp_path / "new"), weights_only=True)
    assert pins(PosixStorage(run)) == {}
    assert not (tmp_path / "new").exists()


def test_a_pin_that_cannot_be_read_keeps_everything(run: Path) -> None:
    (run / "pins" / "odd").mkdir(parents=True)
    (run / "pins" / "odd" / "pin.json").write_text("{}")
    assert sweep(PosixStorage(run), [], 99) == []
    assert (run / Attempt(1, 5, 1).path).is_dir()


def test_a_name_of_a_pin_is_one_commit_only(run: Path) -> None:
    storage = PosixStorage(run)
    for _ in range(2):
        pin(storage, "best", Attempt(1, 5, 1), "")
    with pytest.raises(UsageError, match="taken by another"):
        pin(storage, "best", Attempt(1, 10, 1), "")
    with pytest.raises(UsageError, match="begins with a letter"):
        pin(storage, "../x", Attempt(1, 10, 1), "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{run}@10", "{run}", "--weights-only"], "holds a run already"),
        (["{run}@11", "{new}", "--weights-only"], "has no commit 11"),
        (["{run}@10", "{new}"], "add"),
        (["{run}@10", "{new}", "--weights-only", "--own-options"], "--own-options adds nothing"),
    ],
)
def test_wrong_forks_are_refused(run: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    found = ckpt("fork", *(one.format(run=run, new=tmp_path / "new") for one in arguments))
    assert found.code == 2
    assert says in found.text or "--weights-only" in found.text
    assert not (tmp_path / "new").exists()


def test_a_damaged_commit_is_not_forked(run: Path, tmp_path: Path) -> None:
    (run / Attempt(1, 10, 1).path / "packs/00000/c/0").unlink()
    assert ckpt("fork", f"{run}@10", tmp_path / "new", "--weights-only").code == 74
    assert not (run / "pins").exists()


def test_options_of_the_script_win_over_those_of_a_checkpoint() -> None:
    net = model()
    optim = torch.optim.AdamW(net.parameters(), lr=0.2, weight_decay=0.5)
    plan = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 / (1 + step))
    tracked = Tracked()
    for name, found in {"model": net, "optim": optim, "plan": plan}.items():
        tracked.add(name, found)
    with tracked.own_options():  # as a restore of one that was begun with 0.1, and had come to a quarter of it
        for group in optim.param_groups:
            group.update(lr=0.025, initial_lr=0.1, weight_decay=0.0, betas=(0.1, 0.2))
        plan.load_state_dict({**plan.state_dict(), "base_lrs": [0.1], "last_epoch": 3})
    (group,) = optim.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (pytest.approx(0.05), 0.5, (0.9, 0.999))
    optim.step()
    plan.step()
    assert group["lr"] == pytest.approx(0.2 / 5)


# ---------------------------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (["--keep", "2"], [15, 20]),
        (["--keep-every", "10"], [10, 20]),
        (["--keep-step", "5"], [5, 20]),
        (["--keep", "1", "--keep-every", "15"], [15, 20]),
        (["--keep-best", "1:loss:max"], [5, 20]),
        (["--keep", "9"], [5, 10, 15, 20]),
    ],
)
def test_prune_keeps_what_the_rules_say_and_the_newest(run: Path, rules: list[str], left: list[int]) -> None:
    planned = ckpt("prune", run, *rules, "--dry-run", "--json").json
    assert steps_of(run) == list(STEPS)
    assert ckpt("prune", run, *rules, "--json").json["remove"] == planned["remove"]
    assert steps_of(run) == left
    assert sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir()) == left
    assert ckpt("verify", run).code == 0


def test_prune_keeps_pinned_and_damaged_commits_and_the_newest_that_is_whole(run: Path) -> None:
    pin(PosixStorage(run), "best", Attempt(1, 5, 1), "")
    (run / Attempt(1, 20, 1).path / "manifest.json").unlink()
    text = ckpt("prune", run, "--keep", "1").text
    assert steps_of(run) == [5, 15, 20]
    assert "pinned as best" in text and "kept aside" in text


def test_prune_that_was_cut_off_is_finished_by_the_next(run: Path) -> None:
    retire(run, 5)
    assert (run / Attempt(1, 5, 1).path).is_dir()
    found = ckpt("prune", run, "--keep", "3", "--json").json
    assert found["removed"] == [Attempt(1, 5, 1).path]


@pytest.mark.parametrize("rules", [[], ["--keep-step", "7"], ["--keep", "0"], ["--keep-best", "loss"]])
def test_prune_without_a_rule_or_with_a_wrong_one_removes_nothing(run: Path, rules: list[str]) -> None:
    assert ckpt("prune", run, *rules).code == 2
    assert steps_of(run) == list(STEPS)


def test_prune_of_what_is_no_run_is_refused(tmp_path: Path) -> None:
    ftrain.save(tmp_path / "s", {"x": torch.ones(1)})
    found = ckpt("prune", tmp_path, "--keep", "1")
    assert found.code == 2 and "no run directory" in found.text


def begun(run: Path) -> Head:
    """Somebody has launched it."""
    _, history = catalogue(str(run)).run
    return append(PosixStorage(run), history.head, [GenerationBody(1, 1, (), None)])


def whereabouts(run: Path, **changes: object) -> None:
    found = {"host": "127.0.0.1", "port": 1, "pid": os.getpid(), "on": socket.gethostname(), **changes}
    (run / "coordinator.json").write_text(json.dumps(found))


def test_prune_of_a_run_that_somebody_runs_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(run)
    with socket.create_server(("127.0.0.1", 0)) as server:
        whereabouts(run, on="elsewhere", port=server.getsockname()[1])
        found = ckpt("prune", run, "--keep", "1", "--stopped")
        assert found.code == 2 and "answers at" in found.text
    monkeypatch.setattr("ftrain.cli.ckpt.prune._is_launcher", lambda _: True)
    whereabouts(run)
    found = ckpt("prune", run, "--keep", "1", "--stopped")
    assert found.code == 2 and f"process {os.getpid()} runs it" in found.text
    assert steps_of(run) == list(STEPS)


def test_prune_of_a_run_that_may_be_alive_elsewhere_wants_to_be_told(run: Path) -> None:
    head = begun(run)
    found = ckpt("prune", run, "--keep", "1")
    assert found.code == 2 and "--stopped" in found.text
    whereabouts(run, on="elsewhere")
    found = ckpt("prune", run, "--keep", "1")
    assert found.code == 2 and "does not answer" in found.text
    append(PosixStorage(run), head, [FinishBody(0, 20, "finished")])
    assert ckpt("prune", run, "--keep", "1").code == 0
    assert steps_of(run) == [20]


def test_a_journal_that_somebody_else_continues_fences_the_tool(run: Path) -> None:
    _, history = catalogue(str(run)).run
    retire(run, 5)
    with pytest.raises(Fenced, match="somebody else"):
        append(PosixStorage(run), history.head, [RetireBody(Attempt(1, 10, 1))])


def test_a_reply_that_was_lost_is_read_back(tmp_path: Path) -> None:
    class Lossy(PosixStorage):
        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            raise AlreadyExists(f"{path} exists already")

    append(Lossy(tmp_path), Head(), [FinishBody(0, 20, "finished")])
    assert len(list((tmp_path / "journal").iterdir())) == 1

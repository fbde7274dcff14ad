"""`ftrain.save`, `async_save` and `load`, as those use them who never start `ftrain launch`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import nn

import ftrain
from ftrain.checkpoint.catalogue import find
from ftrain.checkpoint.retain import sweep
from ftrain.checkpoint.staging.stage import Staging
from ftrain.core.layout import CHUNK_BYTES_MAX
from ftrain.errors import (
    AlreadyExists,
    CheckpointNotFound,
    CorruptCheckpoint,
    MismatchedState,
    NotPlainData,
    StorageError,
    UsageError,
)
from ftrain.storage.posix import PosixStorage
from tests.checkpoint.world import bits

Save = Callable[..., None]


def at_once(path: Path, state: Any, **options: Any) -> None:
    ftrain.save(path, state, **options)


def later(path: Path, state: Any, **options: Any) -> None:
    ftrain.async_save(path, state, **options).result(60)


both = pytest.mark.parametrize("save", [at_once, later])


def training() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def train(state: dict[str, Any]) -> None:
    state["model"](torch.randn(8, 6)).sum().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def digest(state: dict[str, Any]) -> list[bytes]:
    tensors = list(state["model"].state_dict().values())
    for one in state["optimizer"].state.values():
        tensors += [value for value in one.values() if isinstance(value, torch.Tensor)]
    return [bits(tensor) for tensor in tensors]


@both
def test_a_model_and_its_optimizer_come_back_into_new_ones(tmp_path: Path, save: Save) -> None:
    state = training()
    for _ in range(3):
        train(state)
    state["optimizer"].param_groups[0]["lr"] = 0.5
    save(tmp_path / "c", {**state, "epoch": 7}, step=3)
    other: dict[str, Any] = {**training(), "epoch": 0}
    assert ftrain.load(tmp_path / "c", other).step == 3
    assert digest(other) == digest(state)
    assert other["optimizer"].param_groups[0]["lr"] == 0.5
    assert other["epoch"] == 7


@both
def test_state_dicts_and_nested_values_come_back_in_place(tmp_path: Path, save: Save) -> None:
    model = training()["model"]
    state = {
        "model": model.state_dict(),
        "nested": {"list": [torch.arange(3), {"deep": torch.tensor(1.5)}, "text"], 5: torch.ones(2, 0)},
        "alone": torch.randn(4, 5).t(),
        "best": 0.25,
    }
    save(tmp_path / "c", state)
    shapes = {"list": [torch.zeros(3, dtype=torch.int64), {"deep": torch.tensor(0.0)}, ""], 5: torch.ones(2, 0)}
    alone = torch.zeros(5, 4)
    into = {"model": training()["model"].state_dict(), "nested": shapes, "alone": alone, "best": 0.0}
    assert ftrain.load(tmp_path / "c", into).step == 0
    assert all(torch.equal(into["model"][key], value) for key, value in model.state_dict().items())
    assert shapes["list"][2] == "text"
    assert torch.equal(shapes["list"][0], torch.arange(3))
    assert shapes["list"][1]["deep"].item() == 1.5
    assert torch.equal(alone, state["alone"])
    assert into["best"] == 0.25


def test_training_that_goes_on_does_not_get_into_an_asynchronous_save(tmp_path: Path) -> None:
    state = training()
    train(state)
    wanted, saves = {}, {}
    for step in range(6):
        wanted[step] = digest(state)
        saves[step] = ftrain.async_save(tmp_path / f"{step}", state, step=step)
        train(state)
    for step, saving in saves.items():
        saving.result(60)
        assert saving.stall_seconds > 0
        other = training()
        train(other)
        assert ftrain.load(tmp_path / f"{step}", other).step == step
        assert digest(other) == wanted[step]


def test_a_tensor_changed_by_hand_voids_the_save_unless_staged_was_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": {"big": torch.zeros(1000)}}
    saving = ftrain.async_save(tmp_path / "a", state)
    saving.staged(60)
    state["w"]["big"].add_(1)
    saving.result(60)
    changed, finish = threading.Event(), Staging.finish

    def finish_late(staging: Staging, *, for_now: bool = False) -> None:
        changed.wait(60)
        finish(staging, for_now=for_now)

    monkeypatch.setattr(Staging, "finish", finish_late)
    saving = ftrain.async_save(tmp_path / "b", state)
    state["w"]["big"].add_(1)
    changed.set()
    with pytest.raises(MismatchedState, match=r"w\.big changed outside of an optimizer's step"):
        saving.result(60)
    assert not (tmp_path / "b").exists()
    saving = ftrain.async_save(tmp_path / "c", state)
    state["w"]["big"].add_(1)
    saving.result(60)
    for name, value in (("a", 0), ("c", 2)):
        ftrain.load(tmp_path / name, state)
        assert bool((state["w"]["big"] == value).all())


def test_an_asynchronous_save_keeps_to_the_rate_that_it_is_given(tmp_path: Path) -> None:
    state = {"w": torch.ones(3 * CHUNK_BYTES_MAX // 4)}
    began = time.monotonic()
    ftrain.async_save(tmp_path / "slow", state, bytes_per_second_max=16 * CHUNK_BYTES_MAX).result()
    assert time.monotonic() - began >= 2 / 16  # the third chunk is not due before; when it comes is up to the disk
    with pytest.raises(UsageError, match="give a number of bytes"):
        ftrain.async_save(tmp_path / "never", state, bytes_per_second_max=-1)
    assert not (tmp_path / "never").exists()


@both
def test_a_path_that_holds_a_checkpoint_is_left_alone(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "c", {"w": torch.ones(3)})
    with pytest.raises(AlreadyExists, match="holds a checkpoint already"):
        save(tmp_path / "c", {"w": torch.zeros(3)})
    state = {"w": torch.zeros(3)}
    ftrain.load(tmp_path / "c", state)
    assert torch.equal(state["w"], torch.ones(3))


@both
def test_what_is_kept_in_a_run_under_a_name_is_below_it_and_no_business_of_retention(
    tmp_path: Path, save: Save
) -> None:
    save(tmp_path / "run", training(), step=7, keep="before-decay")
    assert ftrain.load(tmp_path / "run" / "kept" / "before-decay", training()).step == 7
    assert sweep(PosixStorage(str(tmp_path / "run")), (), 1 << 40) == []
    assert find(f"{tmp_path}/run/kept/before-decay").step == 7
    with pytest.raises(AlreadyExists, match="kept/before-decay"):
        save(tmp_path / "run", training(), keep="before-decay")
    with pytest.raises(UsageError, match="begins with a letter"):
        save(tmp_path / "run", training(), keep="../elsewhere")


@both
def test_what_a_crashed_save_left_is_removed_and_what_is_not_ours_is_not(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "c", {"w": torch.ones(3)})
    (tmp_path / "c/manifest.json").unlink()
    with pytest.raises(CheckpointNotFound, match="neither a checkpoint nor a run"):
        ftrain.load(tmp_path / "c", {"w": torch.ones(3)})
    save(tmp_path / "c", {"w": torch.ones(3)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex, which is not ftrain's"):
        save(tmp_path / "mine", {"w": torch.ones(3)})
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


@both
def test_what_cannot_be_saved_is_named(tmp_path: Path, save: Save) -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        ({"a": {"b": {1, 2}}}, NotPlainData, r"a\.b"),
        ({"a": object()}, NotPlainData, "^a: "),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, MismatchedState, r"a\.b: two tensors"),
        ({5: torch.ones(1)}, UsageError, "strings for names, not 5"),
        ({"optimizer": training()["optimizer"]}, UsageError, "belongs to no tracked module"),
    ]
    for state, error, text in cases:
        with pytest.raises(error, match=text):
            save(tmp_path / "c", state)
    with pytest.raises(UsageError, match="cannot be negative"):
        save(tmp_path / "c", {}, step=-1)
    assert not (tmp_path / "c").exists()


def test_load_of_another_state_names_the_keys_and_changes_nothing(tmp_path: Path) -> None:
    ftrain.save(tmp_path / "c", {"m": {"a": torch.ones(3), "b": torch.ones(2)}, "n": {"x": torch.ones(1)}})
    state = {"m": {"a": torch.zeros(3), "other": torch.zeros(2)}}
    with pytest.raises(MismatchedState, match=r"not in the checkpoint: m\.other; only in the checkpoint: m\.b"):
        ftrain.load(tmp_path / "c", state)
    with pytest.raises(MismatchedState, match=r"m\.a \(float32\[3\] saved, float32\[4\] here\)"):
        ftrain.load(tmp_path / "c", {"m": {"a": torch.zeros(4), "b": torch.zeros(2)}})
    with pytest.raises(MismatchedState, match="'q'"):
        ftrain.load(tmp_path / "c", {"q": {"a": torch.zeros(3)}})
    assert not state["m"]["a"].any()
    ftrain.load(tmp_path / "c", one := {"n": {"x": torch.zeros(1)}})  # what is under other names is not missed
    assert one["n"]["x"].item() == 1


def test_a_damaged_pack_names_tensor_file_and_offset(tmp_path: Path) -> None:
    ftrain.save(tmp_path / "c", {"m": {"a": torch.ones(5000), "b": torch.ones(5000)}})
    with (tmp_path / "c/packs/00000/c/0").open("r+b") as file:
        file.seek(20480 + 100)
        file.write(b"!")
    with pytest.raises(CorruptCheckpoint, match=r"packs/00000/c/0: the 20000 bytes at offset 20480 .*m\.b"):
        ftrain.load(tmp_path / "c", {"m": {"a": torch.ones(5000), "b": torch.ones(5000)}})


def test_a_full_disk_commits_nothing_and_says_so(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "x", str(mount)], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        for save in (at_once, later):
            with pytest.raises(StorageError, match="disk full"):
                save(mount / "c", {"w": torch.ones(4 << 20)})
            assert not (mount / "c/manifest.json").exists()
            save(mount / "small", {"w": torch.ones(100)})
            shutil.rmtree(mount / "small")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_zarr_alone_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a.weight": torch.randn(30, 7), "b": torch.arange(5)}
    ftrain.save(tmp_path / "c", {"m": tensors})
    monkeypatch.chdir(tmp_path / "c")
    group = zarr.open_group("reference://", storage_options={"fo": "refs.json"}, mode="r")
    assert torch.equal(torch.from_numpy(group["m.a.weight"][:]), tensors["a.weight"])
    assert torch.equal(torch.from_numpy(group["m.b"][:]), tensors["b"])


KILLED = """
import os, signal, sys
import torch, ftrain
from ftrain.storage.posix import PosixStorage
count = int(sys.argv[2])
for name in ("create", "write_pack"):
    def hurt(self, *args, call=getattr(PosixStorage, name), **options):
        global count
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        count -= 1
        return call(self, *args, **options)
    setattr(PosixStorage, name, hurt)
state = {"w": torch.full((1000,), 2.0)}
getattr(sys.modules["ftrain"], sys.argv[3])(sys.argv[1], state, step=2)
"""


@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4, 5])
def test_a_save_killed_anywhere_is_a_whole_checkpoint_or_none(tmp_path: Path, calls: int, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "c"), str(calls), how], check=False, cwd=Path(__file__).parents[2]
    )
    state = {"w": torch.zeros(1000)}
    if done.returncode == 0:
        assert calls == 5
        assert ftrain.load(tmp_path / "c", state).step == 2
        assert bool((state["w"] == 2).all())
        return
    with pytest.raises(CheckpointNotFound):
        ftrain.load(tmp_path / "c", state)
    ftrain.save(tmp_path / "c", {"w": torch.ones(1000)}, step=1)
    assert ftrain.load(tmp_path / "c", state).step == 1


def test_a_script_that_ends_gets_its_asynchronous_save_committed(tmp_path: Path) -> None:
    script = "import sys, torch, ftrain; ftrain.async_save(sys.argv[1], {'w': torch.ones(1 << 22)}, step=9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")], check=True, cwd=Path(__file__).parents[2])
    assert ftrain.load(tmp_path / "c", {"w": torch.zeros(1 << 22)}).step == 9


def test_a_forked_child_saves_with_an_engine_of_its_own(tmp_path: Path) -> None:
    ftrain.async_save(tmp_path / "a", {"w": torch.ones(3)}).result(60)
    child = os.fork()
    if child == 0:
        ftrain.async_save(tmp_path / "b", {"w": torch.full((3,), 2.0)}).result(60)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    state = {"w": torch.zeros(3)}
    ftrain.load(tmp_path / "b", state)
    assert torch.equal(state["w"], torch.full((3,), 2.0))

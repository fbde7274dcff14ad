"""`ls`, `show` and `verify`: what is there, what it holds, and whether it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain.checkpoint.catalogue import find
from ftrain.checkpoint.pins import pin
from ftrain.core.messages import Attempt
from ftrain.errors import CheckpointNotFound, CorruptCheckpoint
from ftrain.storage import PosixStorage
from tests.tools.runs import ckpt, files_below, make_run, model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", {step: {"model": model(step)} for step in (5, 10, 15)})


def attempt_of(run: Path, step: int) -> Path:
    return run / Attempt(1, step, 1).path


def test_ls_tells_steps_metrics_and_pins(run: Path) -> None:
    ftrain.save(run, {"model": model()}, step=12, keep="mine")
    pin(PosixStorage(run), "best", Attempt(1, 10, 1), "")
    found = ckpt("ls", run, "--json")
    assert found.code == 0
    rows = found.json["commits"]
    assert [row["step"] for row in rows] == [5, 10, 15, 12]
    assert [row["metrics"]["loss"] for row in rows[:3]] == [0.2, 0.1, 1 / 15]
    assert rows[1]["metrics"]["lr"] == "nan"
    assert [row["pins"] for row in rows] == [[], ["best"], [], ["mine"]]
    assert all(row["whole"] and row["world_size"] == 1 for row in rows)
    text = ckpt("ls", run).text
    assert "0.06667" in text and "best" in text and "whole" in text
    assert find(f"{run}@mine").step == 12


def test_ls_of_a_directory_of_saved_checkpoints_lists_them(tmp_path: Path) -> None:
    for step in (20, 3):
        ftrain.save(tmp_path / f"s{step}", {"x": torch.ones(2)}, step=step)
    assert [row["step"] for row in ckpt("ls", tmp_path, "--json").json["commits"]] == [3, 20]
    assert ckpt("ls", tmp_path / "s3", "--json").json["commits"][0]["path"] == "s3"


@pytest.mark.parametrize("damage", ["manifest", "pack", "short"])
def test_ls_of_a_run_with_files_gone_says_which_commit(run: Path, damage: str) -> None:
    attempt = attempt_of(run, 10)
    if damage == "manifest":
        (attempt / "manifest.json").unlink()
    elif damage == "pack":
        (attempt / "packs/00000/c/0").unlink()
    else:
        with (attempt / "packs/00000/c/0").open("r+b") as file:
            file.truncate(4096)
    found = ckpt("ls", run, "--json")
    assert found.code == 74
    assert [row["whole"] for row in found.json["commits"]] == [True, False, True]
    assert "step 10:" in ckpt("ls", run).text


def test_references_name_commits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(PosixStorage(run), "best", Attempt(1, 10, 1), "")
    monkeypatch.chdir(run.parent)
    wanted = {"run": 15, "run@latest": 15, "run@10": 10, "run@-1": 15, "run@-3": 5, "run@best": 10}
    for reference, step in wanted.items():
        assert find(reference).step == step, reference
    inside = find(str(attempt_of(run, 5)))
    assert (inside.step, inside.manifest_sha256) == (5, find("run@5").manifest_sha256)


@pytest.mark.parametrize("which", ["7", "-4", "nobody", ""])
def test_a_reference_to_what_is_not_there_names_what_is(run: Path, which: str) -> None:
    with pytest.raises(CheckpointNotFound, match="step 5, 10, 15"):
        find(f"{run}@{which}")


def test_an_attempt_that_was_not_committed_is_no_checkpoint(run: Path) -> None:
    shutil.copytree(attempt_of(run, 5), run / Attempt(2, 5, 1).path)
    with pytest.raises(CheckpointNotFound, match="no commit of it"):
        find(str(run / Attempt(2, 5, 1).path))


def test_a_place_with_nothing_is_said_to_be_so(tmp_path: Path) -> None:
    for command in ("ls", "show", "verify"):
        found = ckpt(command, tmp_path)
        assert found.code == 2
        assert "neither a run, nor a checkpoint" in found.text


def test_show_tells_objects_tensors_and_figures(tmp_path: Path) -> None:
    net = model()
    optim = torch.optim.AdamW(net.parameters(), lr=0.25)
    net(torch.randn(4, 8)).sum().backward()
    optim.step()
    ftrain.save(tmp_path / "c", {"model": net, "optim": optim, "big": torch.full((3,), 2.0)}, step=4)
    found = ckpt("show", tmp_path / "c", "--stats", "--only", "big", "--json").json
    assert {one["name"]: one["kind"] for one in found["objects"]} == {
        "model": "module",
        "optim": "optimizer",
        "": "dict",
    }
    assert found["step"] == 4
    (big,) = found["tensors"]
    assert (big["shape"], big["mean"], big["max_abs"]) == ([3], 2.0, 2.0)
    assert big["norm"] == pytest.approx(12**0.5)
    text = ckpt("show", tmp_path / "c", "--tensors").text
    assert "lr 0.25" in text and "model.0.weight" in text


def test_show_of_a_pattern_that_matches_nothing_names_some_that_are_there(run: Path) -> None:
    found = ckpt("show", run, "--only", "head.*")
    assert found.code == 2
    assert "model.0.bias" in found.text


def test_verify_of_whole_checkpoints_reads_them_all(run: Path) -> None:
    found = ckpt("verify", run, "--json")
    assert found.code == 0
    assert [row["step"] for row in found.json["checkpoints"]] == [5, 10, 15]
    assert ckpt("verify", f"{run}@10").code == 0


def test_verify_names_files_that_are_not_ftrains(run: Path) -> None:
    (attempt_of(run, 5) / "packs" / "notes.txt").write_text("mine")
    assert ckpt("verify", f"{run}@5", "--json").json["checkpoints"][0]["strange"] == ["packs/notes.txt"]


def test_verify_finds_a_flipped_bit_anywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {1: {"model": model()}})
    for file in files_below(run):
        whole = file.read_bytes()
        for place in sorted({0, len(whole) // 3, len(whole) // 2, len(whole) - 1}):
            broken = bytearray(whole)
            broken[place] ^= 1 << place % 8
            file.write_bytes(broken)
            found = ckpt("verify", run)
            assert found.code == 74, f"byte {place} of {file.name}"
        file.write_bytes(whole[: len(whole) * 2 // 3])
        assert ckpt("verify", run).code == 74, f"{file.name} cut short"
        file.write_bytes(whole)
    assert ckpt("verify", run).code == 0


def test_verify_names_tensor_rank_file_and_offset(run: Path) -> None:
    pack = attempt_of(run, 10) / "packs/00000/c/0"
    with pack.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff\xff")
    found = ckpt("verify", run)
    assert found.code == 74
    assert "step 5: whole" in found.text and "step 15" not in found.text
    for said in ("packs/00000/c/0", "offset", "model.", "rank 0"):
        assert said in found.text
    kept_going = ckpt("verify", run, "--keep-going", "--json")
    assert [row["whole"] for row in kept_going.json["checkpoints"]] == [True, False, True]
    assert kept_going.code == 74


def test_a_manifest_that_was_replaced_by_another_valid_one_is_not_the_committed_one(run: Path) -> None:
    shutil.rmtree(attempt_of(run, 10))
    ftrain.save(attempt_of(run, 10), {"model": model(99)}, step=10)
    assert "not the one that was committed" in ckpt("verify", f"{run}@10").text


def test_a_pin_that_is_none_is_named(run: Path) -> None:
    (run / "pins" / "odd").mkdir(parents=True)
    (run / "pins" / "odd" / "pin.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match=r"odd/pin\.json"):
        find(str(run))

"""A checkpoint restored into another world size, another parallelism, or what it does not belong to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ftrain.core.local import WorkerLooping, WorkerSealed
from ftrain.core.messages import Resume
from tests.worker.harness import agent, records


def saved_at(path: Path, step: int, training: str, options: dict[str, Any], world_size: int = 2) -> Resume:
    """The commit of a run that was stopped after `step` steps."""
    with agent(path, world_size=world_size) as node:
        attempt = node.arm(step, hold=True)
        node.start(f"tests.worker.trainings:{training}", options)
        node.hear(WorkerSealed)
        node.kill()
        return node.commit(attempt)


def resumed(path: Path, resume: Resume, training: str, options: dict[str, Any], world_size: int = 2) -> None:
    with agent(path, 2, world_size, resume) as node:
        node.release()
        node.start(f"tests.worker.trainings:{training}", options)
        assert node.workers[0].hear(WorkerLooping).step == resume.attempt.step
        assert node.end() == [0] * world_size


@pytest.mark.parametrize(
    ("before", "after", "world_size"), [("fsdp", "fsdp", 3), ("ddp", "fsdp", 2), ("fsdp", "plain", 1)]
)
def test_checkpoint_restored_on_another_mesh_holds_the_same_state(
    tmp_path: Path, before: str, after: str, world_size: int
) -> None:
    with agent(tmp_path) as node:
        attempt = node.arm(3)
        node.release()
        node.start("tests.worker.trainings:standing", {"parallel": before, "steps": 3})
        node.hear(WorkerSealed)
        assert node.end() == [0, 0]
        resume = node.commit(attempt)
    resumed(tmp_path, resume, "standing", {"parallel": after, "steps": 4}, world_size)
    assert records(tmp_path, "end-2-0") == records(tmp_path, "end-1-0")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_samples_dealt_over_a_change_of_world_size_leave_none_out(tmp_path: Path, world_size: int) -> None:
    resume = saved_at(tmp_path, 3, "dealt", {"steps": 100, "batch": 2})  # 12 of 24 samples
    left = 12 // (2 * world_size)
    resumed(tmp_path, resume, "dealt", {"steps": 3 + left, "batch": 2}, world_size)
    done = [
        sample
        for rank in range(3)
        for line in records(tmp_path, f"dealt-{rank}")
        if line["step"] < 3 + left
        for sample in line["samples"]
    ]
    assert sorted(done) == list(range(24))


def test_samples_dealt_where_the_world_does_not_divide_them_repeat_a_few_and_leave_none_out(tmp_path: Path) -> None:
    resume = saved_at(tmp_path, 2, "dealt", {"steps": 100, "batch": 2})  # 8 samples, 2 and a bit for each of 3
    resumed(tmp_path, resume, "dealt", {"steps": 5, "batch": 2}, 3)
    done = [s for rank in range(3) for line in records(tmp_path, f"dealt-{rank}") for s in line["samples"]]
    assert set(done) == set(range(24))
    assert len(done) == 8 + 18


def test_users_own_state_comes_back_as_it_was(tmp_path: Path) -> None:
    resume = saved_at(tmp_path, 2, "custom", {"steps": 5})
    resumed(tmp_path, resume, "custom", {"steps": 5})
    for rank in (0, 1):
        (end,) = records(tmp_path, f"end-{rank}")
        assert end["tensor"] == [[5.0 + rank] * 3] * 2
        assert end["rest"] == repr([(1, 2.5), {"b": b"\x00", 7: None}])
        assert end["step"] == 5


def test_checkpoint_of_another_model_is_refused_with_the_key(tmp_path: Path) -> None:
    resume = saved_at(tmp_path, 2, "other_model", {"steps": 5, "width": 4})
    with agent(tmp_path, 2, resume=resume) as node:
        node.start("tests.worker.trainings:other_model", {"steps": 5, "width": 5})
        node.end()
    refused = records(tmp_path, "refused")[0]
    assert refused["type"] == "MismatchedState"
    assert "model.weight" in refused["message"]


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("no state", "UsageError", "thing.*object has no state_dict"),
        ("not plain", "NotPlainData", "thing.*deep"),
        ("unknown parameter", "UsageError", "optimizer: parameter 0 .* belongs to no tracked module"),
        ("name taken", "UsageError", "model.*already"),
        ("track late", "UsageError", "before the loop"),
        ("steps twice", "UsageError", "steps was called twice"),
        ("join twice", "UsageError", "called twice"),
        ("log a vector", "UsageError", "loss.*3 elements"),
        ("empty loader", "UsageError", "no batches"),
    ],
)
def test_wrong_use_is_refused_in_one_sentence(tmp_path: Path, what: str, kind: str, says: str) -> None:
    with agent(tmp_path, world_size=1) as node:
        node.start("tests.worker.trainings:refusing", {"what": what})
        assert node.end() == [0]
    (refused,) = records(tmp_path, "refused")
    assert refused["type"] == kind
    assert re.search(says, refused["message"]), refused["message"]

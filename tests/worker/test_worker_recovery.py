"""A run whose workers are killed and started anew from a commit is the run that was never hurt, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftrain.core.local import WorkerAtEnd, WorkerLooping, WorkerSealed
from tests.worker.harness import agent, records

TRAINING = "tests.worker.trainings:whole"
STEPS = 10  # of 6 an epoch, with two ranks


def remembered(path: Path, rank: int) -> list[dict[str, Any]]:
    """What the rank did in each step, as it was done last: a rehearsal is overwritten by the step itself."""
    last = {line["step"]: line for line in records(path, f"rank-{rank}")}
    return [{key: value for key, value in last[step].items() if key != "generation"} for step in sorted(last)]


def unhurt(path: Path, options: dict[str, Any], world_size: int) -> None:
    path.mkdir()
    with agent(path, world_size=world_size) as node:
        node.release()
        node.start(TRAINING, options)
        assert set(node.end()) == {0}


def hurt(path: Path, options: dict[str, Any], world_size: int, at: tuple[int, ...]) -> None:
    """Killed after each of the steps of `at` was sealed."""
    path.mkdir()
    resume = None
    for generation, step in enumerate(at, 1):
        with agent(path, generation, world_size, resume) as node:
            attempt = node.arm(step, slot=generation % 2)
            node.start(TRAINING, options)
            assert node.workers[0].hear(WorkerLooping).step == (resume.attempt.step if resume else 0)
            node.hear(WorkerSealed)
            node.kill()
            resume = node.commit(attempt, slot=generation % 2)
    with agent(path, len(at) + 1, world_size, resume) as node:
        node.release()
        node.start(TRAINING, options)
        assert {said.step for said in node.hear(WorkerAtEnd)} == {STEPS}
        assert set(node.end()) == {0}


@pytest.mark.parametrize(
    ("parallel", "world_size", "more"),
    [
        ("ddp", 2, {}),
        ("fsdp", 2, {}),
        ("ddp", 2, {"loader_workers": 2, "own_generator": True}),
        ("ddp", 3, {}),  # where the order in which DDP adds gradients shows
    ],
    ids=["ddp", "fsdp", "loader-with-processes-and-generator", "three-ranks"],
)
def test_workers_killed_after_two_snapshots_end_as_the_unhurt_run(
    tmp_path: Path, parallel: str, world_size: int, more: dict[str, Any]
) -> None:
    options = {"parallel": parallel, "steps": STEPS, **more}
    unhurt(tmp_path / "unhurt", options, world_size)
    hurt(tmp_path / "hurt", options, world_size, at=(3, 8))
    for rank in range(world_size):
        assert remembered(tmp_path / "hurt", rank) == remembered(tmp_path / "unhurt", rank)
        assert records(tmp_path / "hurt", f"end-{rank}") == records(tmp_path / "unhurt", f"end-{rank}")

"""A rank dies or hangs in the middle of a step: the others keep processes, modules and groups, and all go on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.worker.harness import records
from tests.worker.ranks import ranks

TRAINED = "tests.worker.group_trainings:trained"
STEPS = 5


def unhurt(path: Path, kind: str, size: int) -> list[str]:
    """The digest of each rank in a run in which nothing fails."""
    path.mkdir()
    with ranks(path, size, TRAINED, kind=kind, steps=STEPS) as run:
        run.end()
    return digests(path, size)


def digests(path: Path, size: int) -> list[str]:
    return [records(path, f"end-{rank}")[0]["digest"] for rank in range(size)]


@pytest.mark.parametrize(
    ("kind", "size", "where"),
    [
        ("ddp", 3, "forward"),
        ("ddp", 3, "backward"),
        ("ddp unused", 2, "backward"),
        ("ddp compiled", 2, "between"),
        ("fsdp", 2, "forward"),
        ("fsdp", 2, "backward"),
        ("hsdp", 4, "backward"),
        ("tp", 2, "forward"),
        ("tp", 2, "backward"),
    ],
)
def test_killed_rank_is_replaced_and_the_result_is_that_of_an_unhurt_run(
    tmp_path: Path, kind: str, size: int, where: str
) -> None:
    expected = unhurt(tmp_path / "unhurt", kind, size)
    with ranks(tmp_path, size, TRAINED, kind=kind, steps=STEPS, hurt_rank=1, hurt_at=2, where=where) as run:
        pids = [run.pid(rank) for rank in range(size)]
        run.wait_killed(1)
        run.replace(1, kind=kind, steps=STEPS)
        run.end()
        assert [run.pid(rank) == pid for rank, pid in enumerate(pids)] == [rank != 1 for rank in range(size)]
    assert digests(tmp_path, size) == expected
    assert records(tmp_path, "end-1")[0]["started_anew"]


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer", "boundary"])
@pytest.mark.parametrize("at", [0, 1])
def test_rank_killed_before_ddp_has_laid_out_its_buckets_is_replaced(tmp_path: Path, at: int, where: str) -> None:
    expected = unhurt(tmp_path / "unhurt", "ddp", 3)
    with ranks(tmp_path, 3, TRAINED, kind="ddp", steps=STEPS, hurt_rank=1, hurt_at=at, where=where) as run:
        run.wait_killed(1)
        run.replace(1, kind="ddp", steps=STEPS)
        run.end()
    assert digests(tmp_path, 3) == expected


def test_replaced_rank_takes_the_bucket_layout_of_a_survivor_without_rehearsing(tmp_path: Path) -> None:
    expected = unhurt(tmp_path / "unhurt", "ddp", 3)
    with ranks(tmp_path, 3, TRAINED, kind="ddp", steps=STEPS, hurt_rank=1, hurt_at=3, where="backward") as run:
        run.wait_killed(1)
        run.replace(1, kind="ddp", steps=STEPS, layouts=True)
        run.end()
    assert digests(tmp_path, 3) == expected
    layouts = [records(tmp_path, f"end-{rank}")[0]["layout"] for rank in range(3)]
    assert layouts[0] == layouts[1] == layouts[2]
    assert len(layouts[0][0]) > 1


@pytest.mark.parametrize(("kind", "size"), [("ddp", 3), ("fsdp", 2)])
def test_stopped_rank_is_replaced_while_it_still_stands(tmp_path: Path, kind: str, size: int) -> None:
    expected = unhurt(tmp_path / "unhurt", kind, size)
    hurt = {"hurt_rank": 1, "hurt_at": 2, "where": "backward", "signal_number": int(signal.SIGSTOP)}
    with ranks(tmp_path, size, TRAINED, kind=kind, steps=STEPS, **hurt) as run:
        run.wait_stopped(1)
        for other in {*range(size)} - {1}:
            run.wait_blocked(other)  # one that is only about to wait is woken by a later look, which a worker has
        run.replace(1, kind=kind, steps=STEPS)
        run.end()
    assert digests(tmp_path, size) == expected

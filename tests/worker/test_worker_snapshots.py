"""What a worker does when the agent asks it for snapshots: in time, late, in vain, and at the very end."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.core.local import WorkerAtEnd, WorkerLooping, WorkerPlanned, WorkerSealed, WorkerSealFailed
from ftrain.core.page import Field, Phase, verdict_on
from tests.worker.harness import agent, records, wait_for

WHOLE = "tests.worker.trainings:whole"
OPTIONS = {"parallel": "ddp", "steps": 6}


@pytest.mark.parametrize("later", [0, 1], ids=["this-attempt", "a-later-one"])
def test_worker_that_holds_goes_on_when_the_verdict_is_on(tmp_path: Path, later: int) -> None:
    with agent(tmp_path) as node:
        attempt = node.arm(2, hold=True)
        node.release()
        node.start(WHOLE, OPTIONS)
        node.hear(WorkerSealed)
        assert not records(tmp_path, "rank-0")[2:]  # they hold: nobody began the third step
        node.tell(Field.VERDICT, verdict_on(attempt.generation, attempt.number + later, leave=False))
        assert node.end() == [0, 0]
    assert [line["step"] for line in records(tmp_path, "rank-0")] == list(range(6))


def test_verdict_of_a_former_generation_lets_nobody_go_on(tmp_path: Path) -> None:
    with agent(tmp_path) as node:
        attempt = node.arm(2, hold=True)
        node.tell(Field.VERDICT, verdict_on(attempt.generation - 1, attempt.number, leave=False))
        node.start(WHOLE, OPTIONS)
        node.hear(WorkerSealed)
        node.tell(Field.VERDICT, verdict_on(attempt.generation - 1, attempt.number + 7, leave=True))
        assert not records(tmp_path, "rank-0")[2:]
        node.tell(Field.VERDICT, verdict_on(attempt.generation, attempt.number, leave=True))
        assert node.end() == [75, 75]
    assert len(records(tmp_path, "rank-0")) == 2


def test_worker_told_to_leave_after_holding_ends_as_preempted(tmp_path: Path) -> None:
    with agent(tmp_path) as node:
        attempt = node.arm(2, hold=True)
        node.start(WHOLE, OPTIONS)
        node.hear(WorkerSealed)
        node.tell(Field.VERDICT, verdict_on(attempt.generation, attempt.number, leave=True))
        assert node.end() == [75, 75]
        assert node.commit(attempt).attempt.step == 2
    assert len(records(tmp_path, "rank-0")) == 2


def test_worker_at_its_end_waits_until_the_last_state_is_committed(tmp_path: Path) -> None:
    with agent(tmp_path) as node:
        node.start(WHOLE, OPTIONS)
        assert [said.step for said in node.hear(WorkerAtEnd)] == [6, 6]
        node.arm(6, number=1)
        node.hear(WorkerSealed)
        attempt = node.arm(6, number=2, slot=1)  # the first could not be persisted
        assert [said.number for said in node.hear(WorkerSealed)] == [2, 2]
        resume = node.commit(attempt, slot=1)
        assert [worker.process.is_alive() for worker in node.workers if worker.process] == [True, True]
        node.release()
        assert node.end() == [0, 0]
    with agent(tmp_path, 2, resume=resume) as node:
        node.release()
        node.start(WHOLE, OPTIONS)
        assert node.workers[0].hear(WorkerLooping).step == 6
        assert node.end() == [0, 0]
    first, second = records(tmp_path, "end-0")
    assert first == second


def test_worker_let_go_in_a_former_generation_waits_at_the_end_of_this_one(tmp_path: Path) -> None:
    with agent(tmp_path, generation=2) as node:
        node.tell(Field.RELEASE, 1)  # it went on in place since then
        node.start(WHOLE, OPTIONS)
        assert [said.step for said in node.hear(WorkerAtEnd)] == [6, 6]
        node.arm(6)
        assert [said.number for said in node.hear(WorkerSealed)] == [1, 1]
        node.release()
        assert node.end() == [0, 0]


def test_state_that_grows_fails_one_attempt_and_is_in_the_next(tmp_path: Path) -> None:
    with agent(tmp_path) as node:
        node.arm(4, number=1)
        node.start("tests.worker.trainings:growing", {"steps": 12, "grow_at": 2, "only_rank": None})
        assert "optimizer.state" in node.hear(WorkerSealFailed)[0].cause
        node.hear(WorkerAtEnd)
        attempt = node.arm(12, number=2)
        node.hear(WorkerSealed)
        resume = node.commit(attempt)
        node.release()
        assert node.end() == [0, 0]
        found = Checkpoint.open(node.storage, resume.attempt.path, resume.manifest_sha256)
        assert "optimizer.state.model.first.weight.exp_avg" in found.tensors


def test_state_that_grows_on_one_rank_only_fails_one_attempt_and_is_in_the_next(tmp_path: Path) -> None:
    with agent(tmp_path) as node:
        node.arm(4, number=1)
        node.start("tests.worker.trainings:growing", {"steps": 12, "grow_at": 2, "only_rank": 1})
        node.workers[1].hear(WorkerSealFailed)
        node.workers[0].hear(WorkerSealed)
        node.hear(WorkerAtEnd)
        attempt = node.arm(12, number=2)
        node.hear(WorkerSealed)
        assert node.commit(attempt).attempt.step == 12
        node.release()
        assert node.end() == [0, 0]


def test_attempt_that_one_rank_never_sees_is_given_up_and_training_goes_on(tmp_path: Path) -> None:
    with agent(tmp_path) as node:
        node.arm(4, number=1)  # all are to plan again at the next attempt
        node.start("tests.worker.trainings:growing", {"steps": 12, "grow_at": 2, "only_rank": None})
        node.hear(WorkerSealFailed)
        node.hear(WorkerAtEnd)
        page = node.workers[0].page  # the second attempt reaches rank 0 alone
        page.store(Field.ARMED_ATTEMPT, 2)
        page.store(Field.ARMED, 12)
        page.add(Field.EVENT, 1)
        page.wake(Field.EVENT)
        wait_for(lambda: page.load(Field.PHASE) == Phase.SNAPSHOT)
        page.store(Field.ARMED, 0)
        failed = node.workers[0].hear(WorkerSealFailed)
        assert failed.number == 2
        assert "given up" in failed.cause
        attempt = node.arm(12, number=3)
        node.hear(WorkerSealed)
        assert node.commit(attempt).attempt.number == 3
        node.release()
        assert node.end() == [0, 0]


def test_steps_go_on_while_memory_for_snapshots_is_taken_and_a_snapshot_waits_for_it(tmp_path: Path) -> None:
    with agent(tmp_path) as node:
        attempt = node.arm(4)
        node.start("tests.worker.trainings:on_a_slow_host", {"steps": 6})
        assert [said.slots for said in node.hear(WorkerPlanned)] == [0, 0]
        for worker in node.workers:
            wait_for(lambda page=worker.page: page.load(Field.PHASE) == Phase.SNAPSHOT)  # type: ignore[misc]
        assert len(records(tmp_path, "rank-0")) == 4
        (tmp_path / "memory").touch()
        assert [said.slots for said in node.hear(WorkerPlanned)] == [2, 2]
        node.hear(WorkerSealed)
        assert node.commit(attempt).attempt.step == 4
        node.release()
        assert node.end() == [0, 0]


def test_host_that_turns_out_to_have_no_memory_for_snapshots_ends_the_run(tmp_path: Path) -> None:
    with agent(tmp_path, world_size=1) as node:
        node.start("tests.worker.trainings:on_a_slow_host", {"steps": 1_000_000})
        wait_for(lambda: len(records(tmp_path, "rank-0")) >= 3)
        (tmp_path / "memory.new").write_text("the arena needs more")
        (tmp_path / "memory.new").rename(tmp_path / "memory")
        assert node.end() == [1]
    assert not records(tmp_path, "end-0")


def test_run_without_checkpoints_ends_without_waiting(tmp_path: Path) -> None:
    with agent(tmp_path, checkpoints=False) as node:
        node.start(WHOLE, OPTIONS)
        assert node.end() == [0, 0]
        assert node.workers[0].page.load(Field.STEP) == 6
        assert node.workers[0].page.load(Field.COLLECTIVE_SEQ) > 6


def test_users_exception_with_a_collective_under_way_ends_the_worker(tmp_path: Path) -> None:
    with agent(tmp_path) as node:
        node.start("tests.worker.trainings:raising", {"at": 2})
        assert node.workers[0].end() == 1
    assert not records(tmp_path, "unreachable")

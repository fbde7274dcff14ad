"""How a run ends, and what it says of it, as scripted histories."""

from __future__ import annotations

import msgspec
import pytest

from ftrain.core import messages as m
from ftrain.core import rounds, run_state, schedule
from ftrain.core.page import Phase as WorkerPhase
from ftrain.core.run_state import Disconnected, Phase
from ftrain.core.schedule import Cadence
from ftrain.errors import ExitCode
from tests.core.scene import NODES, Scene, successor


def test_preempted_run_saves_its_last_step_and_leaves() -> None:
    scene = Scene().running()
    lines = [*scene.say("a", m.Notice("SIGTERM", 25.0)), *scene.say("b", m.Notice("SIGTERM", 25.0))]
    assert [line for line in lines if "Arm" in line] == ["a <- Arm 2.2 hold", "b <- Arm 2.2 hold"]
    attempt = scene.armed()
    assert scene.log[-2:] == ["a <- Verdict leave", "b <- Verdict leave"]
    for rank, node in enumerate(NODES):
        scene.say(node, m.Sealed(attempt, (rank,)))
        scene.died(node, signal=0, code=int(ExitCode.PREEMPTED), step=2)
        scene.say(node, m.Prepared(attempt, m.PackRecord(rank, f"packs/{rank}", "", "0" * 64, 1, 1, 1)))
    scene.do(run_state.Published(attempt, "f" * 64))
    lines = scene.stored()
    assert lines[-2:] == ["a <- Leave 75", "b <- Leave 75"]


def test_attempt_that_gives_way_to_the_leaving_is_no_failure() -> None:
    scene = Scene().running()
    scene.say("a", m.Notice("SIGTERM", 25.0))
    assert scene.state.barrier is not None
    assert scene.state.barrier.hold
    assert scene.state.cadence.failures == 0
    assert scene.state.cadence.cause == ""
    assert not any("given up" in line for line in scene.told)
    scene.say("a", m.AttemptFailed(scene.state.barrier.attempt, 0, "disk full"))
    assert scene.state.cadence.failures == 1
    assert scene.state.cadence.retry_at == scene.now + schedule.FAILED_PAUSES_SECONDS[0]


def test_leaving_waits_for_no_pause_after_a_commit_that_failed() -> None:
    scene = Scene().running()
    for _ in range(3):
        scene.gave_up("disk full")
    scene.do(run_state.Published(scene.prepared(), "", "disk full"))
    assert scene.state.cadence.commit_at == scene.now + schedule.FAILED_PAUSES_SECONDS[3]
    assert scene.state.barrier is None
    scene.say("a", m.Notice("SIGTERM", 25.0))
    assert scene.state.barrier is not None
    assert scene.state.barrier.hold


@pytest.mark.parametrize(("joins", "code"), [(True, 75), (False, 76)])
def test_notice_before_a_script_has_joined_costs_nothing_if_it_is_one_that_does(joins: bool, code: int) -> None:
    scene = Scene().started(joins)
    for node in NODES:
        scene.report(node, ranks=(m.RunningRank(NODES.index(node), 0, 7, -1, int(WorkerPhase.BOOT)),))
    lines = [line for node in NODES for line in scene.say(node, m.Notice("SIGTERM", 25.0))]
    assert lines == ["a <- Stop 1", "b <- Stop 1"]
    lines = [line for node in NODES for line in scene.died(node, step=-1, ordered=True, stopped=True)]
    assert lines[-2:] == [f"a <- Leave {code}", f"b <- Leave {code}"]
    text = "no step was finished" if joins else "nothing is committed"
    assert scene.state.summary == f"left on SIGTERM; {text}"


@pytest.mark.parametrize(("step", "code"), [(10, 75), (11, 76)])
def test_run_that_is_out_of_time_lost_only_what_it_had_finished(step: int, code: int) -> None:
    scene = Scene().running()
    scene.committed()
    for node in NODES:
        scene.say(node, m.Notice("SIGTERM", 25.0))
    scene.wait(8.0)
    for node in NODES:
        scene.steps(node, step)
    scene.wait(9.0)
    for node in NODES:
        scene.steps(node, step)
    scene.wait(8.0)
    for node in NODES:
        scene.died(node, step=step, ordered=True, stopped=True, phase=WorkerPhase.STEP)
    assert scene.state.exit_code == code
    text = "the last finished step is committed" if code == 75 else "the commit of step 10 stands"
    assert scene.state.summary == f"left on SIGTERM; {text}"


@pytest.mark.parametrize(("step", "text"), [(0, "no step was finished"), (3, "nothing is committed")])
def test_interrupted_run_without_a_commit_does_not_claim_one(step: int, text: str) -> None:
    scene = Scene().running()
    scene.say("a", m.Notice("SIGINT", 0.0))
    for node in NODES:
        scene.died(node, step=step, ordered=True, stopped=True, phase=WorkerPhase.STEP)
    assert scene.state.exit_code == ExitCode.INTERRUPTED
    assert scene.state.summary == f"interrupted; {text}"


def test_notice_before_the_history_is_ours_decides_nothing_about_the_others() -> None:
    second = successor(Scene().running())
    second.do(run_state.Begin())
    second.hello("a")
    second.hello("b")
    assert second.say("b", m.Notice("SIGTERM", 25.0)) == []
    assert second.state.term == 0
    assert second.stored()[:3] == ["a <- Welcome", "b <- Welcome", "b <- Leave 75"]
    assert second.state.phase is Phase.FORMING


def test_finished_run_is_recorded_before_the_nodes_are_let_go() -> None:
    scene = Scene().running()
    for node in NODES:
        scene.steps(node, 10, total_steps=10, at_end=True)
    scene.committed()
    assert scene.log[-2:] == ["a <- Release", "b <- Release"]
    scene.died("a", signal=0)
    assert scene.died("b", signal=0) == ["append finish"]
    assert scene.stored() == ["a <- Leave 0", "b <- Leave 0"]
    scene.do(Disconnected("a"))
    assert scene.do(Disconnected("b")) == ["exit 0"]


def test_last_state_that_no_try_could_commit_ends_with_74_and_says_what_is_lost() -> None:
    scene = Scene().running()
    scene.at_end(10)
    began = scene.now
    for _ in range(rounds.LAST_TRIES):
        assert scene.log[-1] == f"b <- Arm 10.{scene.state.attempts}"
        scene.gave_up("packs/0: No space left on device")
    assert scene.log[-2:] == ["a <- Release", "b <- Release"]
    paused = sum(schedule.FAILED_PAUSES_SECONDS[: rounds.LAST_TRIES - 1])  # between the tries, not after the last one
    assert scene.now - began == pytest.approx(paused + scene.state.policy.heartbeat_seconds, abs=0.01)
    for node in NODES:
        scene.died(node, signal=0, step=10, at_end=True, total_steps=10)
    assert scene.stored() == ["a <- Leave 74", "b <- Leave 74"]
    assert scene.state.summary == (
        "finished, but the last state, of step 10, could not be committed: packs/0: No space left on device; "
        "nothing is committed"
    )
    assert scene.state.history.finish is not None
    assert scene.state.history.finish.exit_code == ExitCode.STORAGE


def test_last_state_that_is_lost_names_the_commit_that_stands() -> None:
    scene = Scene().running()
    scene.committed()
    scene.at_end(20)
    for _ in range(rounds.LAST_TRIES):
        scene.gave_up("disk full")
    for node in NODES:
        scene.died(node, signal=0, step=20, at_end=True, total_steps=20)
    assert scene.state.exit_code == ExitCode.STORAGE
    assert scene.state.summary.endswith("disk full; the commit of step 10 stands")


def test_successor_knows_that_the_last_state_is_lost() -> None:
    scene = Scene().running()
    scene.at_end(10)
    for _ in range(rounds.LAST_TRIES):
        scene.gave_up("disk full")
    second = successor(scene)
    second.versions = scene.versions
    second.do(run_state.Begin())
    for node in NODES:
        second.hello(node)
    second.stored()
    for node in NODES:
        second.died(node, signal=0, step=10, at_end=True, total_steps=10)
    assert second.state.exit_code == ExitCode.STORAGE


def test_failures_before_the_end_take_no_try_from_the_last_state() -> None:
    scene = Scene().running()
    for _ in range(rounds.LAST_TRIES):
        scene.gave_up("disk full")
    assert scene.state.cadence.failures == rounds.LAST_TRIES
    assert scene.state.barrier is not None
    scene.say("a", m.ArmReply(scene.state.barrier.attempt, False, -1, "it is at its end"))
    scene.at_end(12)
    scene.rest()
    assert "Release" not in " ".join(scene.log)
    assert scene.state.barrier is not None
    assert scene.state.barrier.attempt.step == 12


def test_last_step_whose_commit_is_damaged_is_committed_again() -> None:
    scene = Scene().running()
    scene.at_end(10)
    attempt = scene.committed()
    state = msgspec.structs.replace(scene.state, suspects=frozenset({attempt}), cadence=Cadence())
    scene.state = state
    assert "Release" not in " ".join(scene.at_end(10))
    assert scene.log[-1] == "b <- Arm 10.2"


def test_attempt_that_fails_before_the_first_commit_does_not_claim_one() -> None:
    scene = Scene().running()
    scene.gave_up("disk full")
    assert scene.told[-1] == "checkpoint of step 10 given up: disk full; nothing is committed"


def test_lost_release_is_said_again_to_who_still_waits() -> None:
    scene = Scene().running()
    for node in NODES:
        scene.steps(node, 10, total_steps=10, at_end=True)
    scene.committed()
    scene.died("a", signal=0)
    assert scene.steps("b", 10, total_steps=10, at_end=True) == ["b <- Release"]

"""The coordinator as scripted histories: what happened on the left, what it did about it on the right."""

from __future__ import annotations

import msgspec

from ftrain.core import coordinator, journal, run_state
from ftrain.core import messages as m
from ftrain.core.journal import Outcome
from ftrain.core.run_state import Disconnected, Phase, Received, Stored
from ftrain.errors import ExitCode
from tests.core.scene import NODES, POLICY, Scene, successor

# ------------------------------------------------------------------------------------------------------------- launch


def test_launch_writes_each_record_before_it_acts_upon_it() -> None:
    scene = Scene()
    assert scene.do(run_state.Begin()) == ["append run"]
    assert scene.hello("a") == []
    assert scene.hello("b") == []
    assert scene.stored() == ["a <- Welcome", "b <- Welcome", "append generation", "a <- Prepare 1"]
    assert scene.say("a", m.StoreReady(1, "10.0.0.1", 29400)) == []
    assert scene.stored() == ["a <- Start 1", "b <- Start 1"]
    assert scene.state.phase is Phase.RUNNING


def test_checkpoint_that_goes_well() -> None:
    scene = Scene().running()
    assert scene.log[-2:] == ["a <- Arm 10.1", "b <- Arm 10.1"]
    attempt = scene.prepared()
    assert scene.log[-1] == "publish 10"
    assert scene.do(run_state.Published(attempt, "f" * 64)) == ["append commit"]
    assert scene.stored()[:2] == ["a <- Committed 10.1", "b <- Committed 10.1"]


def test_older_commit_is_retired_and_only_then_deleted() -> None:
    scene = Scene().running()
    scene.committed()
    scene.steps("a", 11)
    scene.steps("b", 11)
    scene.committed()
    assert "append retire" in scene.log
    assert "discard 10.1" not in scene.log
    assert scene.stored()[0] == "discard 10.1"


def test_what_follows_from_a_heartbeat_is_looked_at_a_moment_later_and_what_follows_from_a_death_at_once() -> None:
    """So that one look serves for all that many nodes say meanwhile."""
    scene = Scene().running()
    scene.armed()
    scene.wait(0.0)
    report = msgspec.structs.replace(scene.state.reports["a"], version=scene.versions["a"] + 1)
    waiting, actions = coordinator.step(scene.state, Received("a", m.Heartbeat(1, report)), scene.now)
    assert [type(action.message) for action in actions if isinstance(action, run_state.Send)] == [m.Heard]
    assert scene.now < coordinator.wake_at(waiting, scene.now) == waiting.looks_at < scene.now + 0.001
    looked, _ = coordinator.step(waiting, run_state.Tick(), waiting.looks_at)
    assert coordinator.wake_at(looked, waiting.looks_at) > scene.now + 0.5
    died = m.RankExit(0, 0, 7, 0, 9, 0, 3)
    report = msgspec.structs.replace(report, ranks=(), exits=(died,), stopped=True, looping=False)
    ended, _ = coordinator.step(waiting, Received("a", m.Changed(report)), scene.now)
    assert ended.phase is not Phase.RUNNING
    assert ended.looks_at == float("inf")


def test_lost_start_is_said_again_at_the_next_report() -> None:
    scene = Scene()
    scene.do(run_state.Begin())
    scene.hello("a")
    scene.hello("b")
    scene.stored()
    scene.stored()
    scene.say("a", m.StoreReady(1, "10.0.0.1", 29400))
    assert scene.report("b", generation=0, stopped=True) == ["b <- Start 1"]


def test_lost_arm_is_said_again_until_the_node_answers() -> None:
    scene = Scene().running()
    assert scene.steps("b", 1) == ["b <- Arm 10.1"]
    scene.say("b", m.ArmReply(m.Attempt(1, 10, 1), True))
    assert scene.steps("b", 2) == []


def test_report_that_was_overtaken_changes_nothing() -> None:
    scene = Scene().running()
    scene.steps("a", 5)
    old = m.Report(version=1, generation=1, stopped=False)
    scene.do(Received("a", m.Heartbeat(9, old)))
    assert scene.state.furthest == 5
    scene.do(Received("a", m.Hello("a", 0, 1, "10.0.0.1", "a", 1, "run", "job", "1", 1, old)))
    assert scene.state.furthest == 5


# ----------------------------------------------------------------------------------------------------------- failures


def test_rank_that_dies_starts_the_next_generation_from_the_newest_commit() -> None:
    scene = Scene().running()
    scene.committed()
    scene.steps("b", 12)
    lines = scene.died("a")
    assert "b <- Stop 1" in lines
    scene.died("a", stopped=True)
    lines = scene.died("b", ordered=True, stopped=True)
    assert lines[:2] == [
        "interrupted at 12: rank 0 was killed by SIGKILL after step 12",
        "continues at 10 from storage, 0 kept, 2 new",
    ]
    assert "append generation" in lines
    assert scene.state.resume is not None
    assert scene.state.resume.attempt == m.Attempt(1, 10, 1)


def test_rank_that_dies_after_all_sealed_does_not_cost_the_commit() -> None:
    scene = Scene().running()
    attempt = scene.armed()
    for rank, node in enumerate(NODES):
        scene.say(node, m.Sealed(attempt, (rank,)))
    scene.died("a", stopped=True)
    scene.died("b", ordered=True, stopped=True)
    assert scene.state.phase is Phase.SETTLING
    for rank, node in enumerate(NODES):
        scene.say(node, m.Prepared(attempt, m.PackRecord(rank, f"packs/{rank}", "", "0" * 64, 1, 1, 1)))
    assert scene.do(run_state.Published(attempt, "f" * 64)) == ["append commit"]
    assert "append generation" not in scene.log[scene.log.index("append commit") :]
    scene.stored()
    assert scene.state.resume is not None
    assert scene.state.resume.attempt == attempt


def test_silent_node_is_lost_when_its_lease_runs_out() -> None:
    scene = Scene().running()
    scene.now += 9.0
    scene.steps("a", 3)
    lines = scene.wait(2.0)
    assert "a <- Stop 1" in lines
    assert scene.state.gone == {"b"}


def test_node_whose_workers_a_stale_coordinator_stopped_ends_the_generation() -> None:
    scene = Scene().running()
    lines = scene.died("b", ordered=True, stopped=True)
    assert "a <- Stop 1" in lines
    assert scene.state.failure is not None
    assert scene.state.failure.summary == "node 1 (b) was stopped by a former coordinator"


def test_new_life_of_a_node_replaces_the_old_one() -> None:
    scene = Scene().running()
    scene.do(Disconnected("b"))
    lines = scene.hello("b", life=".2")
    assert "a <- Stop 1" in lines
    assert set(scene.state.nodes) == {"a", "b.2"}


def test_new_life_of_a_node_waits_for_the_old_one_while_that_is_connected() -> None:
    scene = Scene().running()
    assert scene.hello("b", life=".2") == ["b.2 <- Welcome", "b.2 <- Tell"]
    assert scene.state.phase is Phase.RUNNING


# ------------------------------------------------------------------------------------------------- two coordinators


def test_successor_carries_on_with_a_generation_that_runs() -> None:
    first = Scene().running()
    second = successor(first)
    second.do(run_state.Begin())
    second.stored()
    alive = m.Report(version=9, generation=1, stopped=False, attempt_seen=1, looping=True, first_step=0)
    for node in NODES:
        rank = m.RunningRank(NODES.index(node), 0, 7, 4, 3, joined=True)
        lines = second.hello(node, msgspec.structs.replace(alive, ranks=(rank,)), term_seen=1)
    assert second.state.phase is Phase.RUNNING
    assert "a <- Stop 1" not in second.log
    assert lines[0] == "b <- Welcome"


def test_successor_retires_what_its_predecessor_had_no_time_to_when_the_ranks_are_in_their_loop() -> None:
    first = Scene().running()
    old = first.committed()
    for node in NODES:
        first.steps(node, 11)
    new = first.committed()
    assert [body.attempt for _, body in first.state.history.commits] == [old, new]
    second = successor(first)
    second.do(run_state.Begin())
    second.stored()
    for node in NODES:
        assert "append retire" not in second.log
        rank = m.RunningRank(NODES.index(node), 0, 7, 24, 3, joined=True)
        second.hello(node, m.Report(9, 1, False, 0, (rank,), looping=True, first_step=0), term_seen=1)
    assert second.log.count("append retire") == 1
    assert second.stored()[0] == f"discard {old.step}.{old.number}"


def test_successor_numbers_its_attempts_apart_from_those_that_nobody_saw() -> None:
    first = Scene().running()
    second = successor(first)
    second.do(run_state.Begin())
    second.stored()
    for node in NODES:
        rank = m.RunningRank(NODES.index(node), 0, 7, 4, 3, joined=True)
        second.hello(node, m.Report(9, 1, False, 0, (rank,), looping=True, first_step=0), term_seen=1)
    assert second.state.barrier is not None
    assert first.state.barrier is not None
    assert second.state.barrier.attempt.step == first.state.barrier.attempt.step
    assert second.state.barrier.attempt.path != first.state.barrier.attempt.path


def test_stale_coordinator_that_finds_its_name_taken_says_nothing_more() -> None:
    stale = Scene().running()
    attempt = stale.prepared()
    stale.do(run_state.Published(attempt, "f" * 64))
    create = stale.requests[0]
    assert stale.stored(Outcome.EXISTS) == ["read"]
    other = journal.encode(journal.Record(3, "x", "c2:3", 0.0, journal.RunBody("run", "job", "1")))
    assert stale.do(Stored(journal.ReadBack(create.path, other))) == [f"exit {int(ExitCode.FAILED)}"]
    assert stale.say("a", m.Sealed(attempt, (0,))) == []
    assert stale.wait(100.0) == []


def test_stale_coordinator_that_waits_for_nodes_looks_and_stops() -> None:
    stale = Scene()
    stale.do(run_state.Begin())
    stale.hello("a")
    assert "read" in stale.stored()
    request = stale.requests.pop()
    assert stale.do(Stored(journal.ReadBack(request.path, b"somebody else's"))) == [f"exit {int(ExitCode.FAILED)}"]


def test_member_that_left_before_the_takeover_was_recorded_is_not_adopted() -> None:
    second = successor(Scene().running())
    second.do(run_state.Begin())
    rank = m.RunningRank(0, 0, 7, 4, 3, joined=True)
    second.hello("a", m.Report(9, 1, False, 0, (rank,), looping=True), term_seen=1)
    second.hello("b", m.Report(9, 1, False, 0, (rank,), looping=True), term_seen=1)
    second.do(Disconnected("a"))
    second.stored()
    assert second.state.phase is Phase.ADOPTING


# ------------------------------------------------------------------------------------------------------------ storage


def test_commit_record_without_a_reply_is_read_back_before_anything_is_said() -> None:
    scene = Scene().running()
    attempt = scene.prepared()
    scene.do(run_state.Published(attempt, "f" * 64))
    create = scene.requests[0]
    assert isinstance(create, journal.Create)
    assert scene.stored(Outcome.UNKNOWN) == ["read"]
    scene.died("a")
    assert not [line for line in scene.log if line.startswith(("discard", "a <- Abort"))]
    assert scene.do(Stored(journal.ReadBack(create.path, create.data)))[0] == "a <- Committed 10.1"


def test_manifest_that_cannot_be_written_aborts_and_pauses() -> None:
    scene = Scene().running()
    attempt = scene.prepared()
    lines = scene.do(run_state.Published(attempt, "", "disk full"))
    assert lines == ["a <- Abort 10.1", "b <- Abort 10.1", "discard 10.1"]
    assert scene.wait(1.0) == ["a <- Arm 12.2", "b <- Arm 12.2"]


def test_same_error_twice_gives_up_and_says_so() -> None:
    scene = Scene().running()
    for generation in (1, 2):
        error = m.ErrorReport("ValueError", "bad", "Traceback: bad", "train.py:3", scene.now)
        for node in NODES:
            exit = m.RankExit(NODES.index(node), 0, 7, 1, 0, 12, error=error, unix_seconds=scene.now)
            scene.report(node, exits=(exit,), stopped=True)
        if generation == 1:
            scene.stored()
            scene.say("a", m.StoreReady(2, "10.0.0.1", 29400))
            scene.steps("a", 0)
            scene.steps("b", 0)
    assert scene.log[-1] == "append finish"
    assert scene.state.exit_code == ExitCode.FAILED
    assert "the same error came back at step 12" in scene.state.summary
    assert scene.state.summary.endswith("Traceback: bad")


def test_node_of_another_run_is_declined_and_forgotten() -> None:
    scene = Scene().running()
    stranger = m.Hello("x", -1, 1, "10.0.0.9", "x", 1, "another", "job", "1", 0)
    assert scene.do(Received("x", stranger)) == [f"x <- Declined {int(ExitCode.USAGE)}"]
    assert "x" not in scene.state.nodes


def test_coordinator_that_nodes_obey_no_more_looks_for_a_later_one_and_ends() -> None:
    """The later one is dead, so nobody else tells it; and it commits nothing, so it writes nothing."""
    scene = Scene().started()
    for _ in range(2):
        scene.hello("b", term_seen=9)
    (read,) = [one for one in scene.requests if isinstance(one, journal.Read)]  # no more than one in a lease's time
    scene.requests.clear()
    scene.do(Stored(journal.ReadBack(read.path, None)))
    assert scene.state.phase is run_state.Phase.RUNNING
    for _ in range(2):
        scene.wait(0.6 * POLICY.lease_seconds)
        scene.hello("a")
        scene.hello("b", term_seen=9)
    (read,) = [one for one in scene.requests if isinstance(one, journal.Read)]
    scene.do(Stored(journal.ReadBack(read.path, b"of another")))
    assert scene.state.phase is run_state.Phase.OVER


def test_coordinator_of_the_newest_term_that_nodes_have_seen_looks_for_nobody() -> None:
    scene = Scene().started()
    scene.hello("b", term_seen=scene.state.term)
    assert not [one for one in scene.requests if isinstance(one, journal.Read)]


def test_coordinator_whose_node_is_in_a_later_generation_looks_for_who_began_it() -> None:
    scene = Scene().started()
    scene.hello("b", m.Report(9, scene.state.number + 1, True))
    assert [one for one in scene.requests if isinstance(one, journal.Read)]

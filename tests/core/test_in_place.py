"""Generations that follow one another in place, as transcripts of the coordinator and of one agent."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from ftrain.core import ending, journal, local, node, run_state
from ftrain.core import messages as m
from ftrain.core.membership import FormationPolicy, Generation, Member, Node, form, same_places
from ftrain.core.page import Phase
from ftrain.core.run_state import Phase as RunPhase
from ftrain.core.supervision import FailureClass
from tests.core import test_node
from tests.core.scene import NODES, POLICY, Scene
from tests.core.test_node import ATTEMPT, start

LINE = m.Line(8, m.Tier.LIVE, None, ((3, 2),))


def rank_of(name: str, step: int, **more: object) -> m.RunningRank:
    return m.RunningRank(NODES.index(name), 0, 7, step, 3, joined=True, looped=True, shard="all", replays=True, **more)  # type: ignore[arg-type]


def in_loop(scene: Scene, step: int = 0) -> Scene:
    for name in NODES:
        scene.report(name, ranks=(rank_of(name, step),), looping=True, first_step=0)
    return scene


def dead(name: str, step: int, kept: tuple[int, ...], signal: int = 9) -> m.RankExit:
    return m.RankExit(NODES.index(name), 0, 7, 0, signal, step, 3, kept=kept, shard="all", replays=True)


def halted(scene: Scene, name: str, step: int, **more: object) -> list[str]:
    rank = rank_of(name, step, halted=True, live=step, kept=(step - 1, step))
    return scene.report(name, ranks=(rank,), halted=True, **more)


def sealed(scene: Scene) -> m.Attempt:
    """All ranks have sealed the attempt under way, of step 10, which is being written from now on."""
    attempt = scene.armed()
    in_loop(scene, 10)
    for rank in (0, 1):
        scene.say(NODES[rank], m.Sealed(attempt, (rank,)))
    return attempt


def test_survivor_goes_on_in_place_with_a_newcomer() -> None:
    scene = in_loop(Scene().started(), 8)
    lines = scene.report("a", exits=(dead("a", 8, (7, 8)),))
    assert {"a <- Halt", "b <- Halt"} <= set(lines)
    scene.report("a", exits=(dead("a", 8, (7, 8)),), stopped=True)
    lines = halted(scene, "b", 8)
    assert "interrupted at 8: rank 0 was killed by SIGKILL after step 8" in lines
    assert "continues at 8 from live, 1 kept, 1 new" in lines
    scene.stored()
    lines = scene.say("a", m.StoreReady(2, "10.0.0.1", 29400))
    assert lines == ["a <- Start 2", "b <- Start 2"]
    assert scene.state.line == m.Line(8, m.Tier.LIVE, None, ((1, 0),))
    assert scene.state.survivors == {1}


def test_newcomer_that_dies_before_the_survivors_node_has_reported_costs_no_step() -> None:
    scene = in_loop(Scene().started(), 8)
    scene.report("a", exits=(dead("a", 8, (7, 8)),), stopped=True)
    halted(scene, "b", 8)
    scene.stored()
    assert scene.say("a", m.StoreReady(2, "10.0.0.1", 29400)) == ["a <- Start 2", "b <- Start 2"]
    newcomer = msgspec.structs.replace(dead("a", -1, (7, 8)), phase=int(Phase.BOOT))  # the black box outlives it
    lines = scene.report("a", exits=(newcomer,))
    assert {"a <- Halt", "b <- Halt"} <= set(lines)
    scene.report("a", exits=(newcomer,), stopped=True)
    halted(scene, "b", 8)
    assert "continues at 8 from live, 1 kept, 1 new" in scene.wait(5.0)  # a pause: nothing was gained since


def test_ranks_that_lost_each_other_go_on_although_nobody_died() -> None:
    scene = in_loop(Scene().started(), 8)
    rank = rank_of("b", 8, halted=True, live=8, kept=(7, 8))
    scene.report("b", ranks=(rank,), looping=False)  # by itself: nobody told it to
    assert scene.state.failure is not None
    assert scene.state.failure.kind is FailureClass.LINK
    halted(scene, "b", 8)
    lines = halted(scene, "a", 8)
    assert "continues at 8 from live, 2 kept, 0 new" in lines


def test_nodes_that_are_gone_are_forgotten_when_the_next_generation_begins() -> None:
    scene = Scene().started()
    for life in range(20):
        scene.hello("a", life=str(life + 1))
        scene.do(run_state.Disconnected(f"a{life}" if life else "a"))
        scene.report("b", stopped=True)
        scene.stored()
        scene.say(f"a{life + 1}", m.StoreReady(scene.state.number, "10.0.0.1", 29400))
        assert scene.state.members == (f"a{life + 1}", "b")
        assert set(scene.state.reports) == {f"a{life + 1}", "b"}


def test_rank_that_lost_its_peers_is_explained_by_the_node_that_is_gone() -> None:
    scene = in_loop(Scene().started(), 8)
    rank = rank_of("b", 8, halted=True, live=8, kept=(7, 8))
    scene.report("b", ranks=(rank,), looping=False)
    halted(scene, "b", 8)
    scene.do(run_state.Disconnected("a"))
    scene.wait(5.0)
    assert scene.state.failure is not None
    assert scene.state.failure.kind is FailureClass.NODE
    assert "interrupted at 8: node 0 was lost: its agent's channel closed" in scene.log


def raised(name: str, step: int, at: float) -> m.RankExit:
    error = m.ErrorReport("ValueError", "bad", "Traceback\nValueError: bad", "train.py:7", at)
    return m.RankExit(NODES.index(name), 0, 7, 1, 0, step, 3, error, at, kept=(step - 1, step), shard="all")


def fails(scene: Scene, step: int, snapshot: m.Attempt, newcomer: bool) -> list[str]:
    """Rank 0 raises at that step, and both go on from that snapshot, or would."""
    shards = {"shard": "all", "replays": False}
    exits = (raised("a", step, scene.now),)
    scene.report("a", exits=exits, stopped=True, held=(snapshot,))
    rank = msgspec.structs.replace(rank_of("b", step + 1, halted=True, live=step + 1), **shards)
    lines = scene.report("b", ranks=(rank,), halted=True, held=(snapshot,))
    if newcomer:
        scene.stored()
        scene.say("a", m.StoreReady(scene.state.number, "10.0.0.1", 29400))
    return lines


def test_error_that_comes_back_at_its_step_is_the_users_own_although_a_snapshot_was_taken_before_it() -> None:
    scene = in_loop(Scene().started(), 7)
    lines = fails(scene, 7, m.Attempt(1, 2, 1), newcomer=True)
    assert "continues at 2 from arena, 1 kept, 1 new" in lines
    in_loop(scene, 6)
    lines = fails(scene, 7, m.Attempt(1, 6, 2), newcomer=False)
    assert any("append finish" in line for line in lines), lines
    assert "the same error came back at step 7" in scene.state.summary


def test_ranks_that_hang_on_their_way_are_halted_and_come_anew() -> None:
    scene = in_loop(Scene().started(), 8)
    scene.report("a", exits=(dead("a", 8, (7, 8)),), stopped=True)
    halted(scene, "b", 8)
    scene.stored()
    scene.say("a", m.StoreReady(2, "10.0.0.1", 29400))
    still = m.Progress(still_seconds=301.0, idle_seconds=301.0)
    for name in NODES:
        coming = msgspec.structs.replace(rank_of(name, 8), phase=int(Phase.RESTORING), progress=still)
        scene.report(name, ranks=(coming,))
    assert {"a <- Halt", "b <- Halt"} <= set(scene.wait(2.0))
    assert scene.state.failure is not None
    assert "on the way into the generation" in scene.state.failure.summary


def test_sealed_attempt_is_committed_while_the_next_generation_begins() -> None:
    scene = Scene().running()
    attempt = sealed(scene)
    scene.report("a", exits=(dead("a", 10, (9, 10)),), stopped=True, attempt_seen=attempt.number)
    lines = halted(scene, "b", 10, attempt_seen=attempt.number)
    assert "continues at 10 from live, 1 kept, 1 new" in lines
    assert scene.state.writing is not None
    assert scene.state.writing.attempt == attempt


def test_attempt_that_waits_for_a_node_that_is_gone_is_given_up_at_once() -> None:
    """Not when the node's lease runs out: its snapshot in memory is gone with it."""
    scene = Scene().running()
    attempt = sealed(scene)
    assert scene.state.writing is not None
    scene.do(run_state.Disconnected("a"))
    halted(scene, "b", 10, attempt_seen=attempt.number)
    assert scene.state.phase in (RunPhase.RUNNING, RunPhase.HALTING)
    for _ in range(3):
        scene.wait(ending.RECONNECT_SECONDS / 2)
        halted(scene, "b", 10, attempt_seen=attempt.number)
    assert scene.state.writing is None
    assert scene.state.phase is RunPhase.FORMING
    assert "a" in scene.state.nodes, "its lease is not over"


def test_ranks_that_stand_still_late_are_waited_for_although_another_node_is_gone() -> None:
    scene = in_loop(Scene().started(), 8)
    scene.do(run_state.Disconnected("a"))
    scene.report("b", ranks=(rank_of("b", 8, halted=True, live=8, kept=(7, 8)),))
    assert scene.state.phase is RunPhase.HALTING
    busy = m.Report(
        scene.state.reports["b"].version + 1, scene.state.number, False, 0, (rank_of("b", 8),), first_step=0
    )
    for _ in range(4):
        scene.wait(ending.RECONNECT_SECONDS)
        scene.say("b", m.Heartbeat(1, busy))
    assert scene.state.phase is RunPhase.HALTING, "its own time is not over"
    halted(scene, "b", 8)
    assert scene.state.phase is RunPhase.FORMING
    assert not scene.state.scrapped


def test_attempt_is_waited_for_while_who_writes_it_is_heard() -> None:
    scene = Scene().running()
    attempt = sealed(scene)
    scene.report("a", exits=(dead("a", 10, (9, 10)),), stopped=True, attempt_seen=attempt.number)
    scene.report("b", exits=(dead("b", 10, (9, 10)),), stopped=True, attempt_seen=attempt.number)
    for _ in range(5):
        scene.wait(ending.RECONNECT_SECONDS)
        for name in NODES:
            scene.say(name, m.Heartbeat(1, scene.state.reports[name]))
    assert scene.state.phase is RunPhase.SETTLING
    assert scene.state.writing is not None


def test_notice_during_a_recovery_waits_for_its_end() -> None:
    scene = in_loop(Scene().started(), 8)
    scene.report("a", exits=(dead("a", 8, (7, 8)),), stopped=True)
    scene.say("b", m.Notice("SIGTERM", 30.0))
    assert scene.state.phase is RunPhase.HALTING
    lines = halted(scene, "b", 8)
    assert "continues at 8 from live, 1 kept, 1 new" in lines


def test_all_of_a_node_that_is_silent_is_stopped_when_nothing_stands_still_in_time() -> None:
    scene = in_loop(Scene().started(), 8)
    scene.report("a", exits=(dead("a", 8, (7, 8)),), stopped=True)
    scene.report("b", ranks=(rank_of("b", 8),), looping=True, first_step=0)
    for _ in range(8):
        scene.wait(5.0)
        scene.report("b", ranks=(rank_of("b", 8),), looping=True, first_step=0)
    assert scene.state.phase is RunPhase.STOPPING
    assert "b <- Stop 1" in scene.log


def smaller() -> Scene:
    """One node of two at most, in its loop; the other one joins later."""
    policy = replace(POLICY, formation=FormationPolicy(1, 2, last_call_seconds=1.0))
    scene = Scene(policy)
    scene.do(run_state.Begin())
    scene.hello("a")
    scene.stored()
    scene.do(run_state.Stored(journal.ReadBack(scene.requests.pop(0).path, None)))  # nobody else continued the run
    scene.wait(2.0)
    scene.stored()
    scene.say("a", m.StoreReady(scene.state.number, "10.0.0.1", 29400))
    scene.report("a", ranks=(rank_of("a", 3),), looping=True, first_step=0)
    return scene


def test_node_that_joins_a_smaller_run_is_taken_in_after_a_commit() -> None:
    scene = smaller()
    scene.hello("b")
    scene.wait(2.0)
    lines = scene.report("a", ranks=(rank_of("a", 4),), looping=True, first_step=0)
    assert scene.state.drain is not None
    assert scene.state.barrier is not None, lines
    assert scene.state.barrier.hold
    attempt = scene.state.barrier.attempt
    scene.say("a", m.ArmReply(attempt, True))
    assert "a <- Verdict leave" in scene.log
    scene.say("a", m.Prepared(attempt, m.PackRecord(0, "packs/0", "", "0" * 64, 1, 1, 1)))
    scene.do(run_state.Published(attempt, "f" * 64))
    scene.stored()
    left = m.RankExit(0, 0, 7, 75, 0, attempt.step, 6)
    scene.report("a", exits=(left,), stopped=True)
    assert scene.state.phase is RunPhase.STARTING
    assert scene.state.members == ("a", "b")
    assert scene.state.resume is not None
    assert scene.state.resume.attempt == attempt


# ------------------------------------------------------------------------------------------------------------ one agent


def survivors(scene: test_node.Scene) -> None:
    """Rank 2 dies after step 8, rank 3 stands still."""
    scene.pages[2] = scene.pages[3] = (8, Phase.STEP)
    scene.exited(2, step=8)
    assert "RevokePages" in scene.say(m.Halt(1, 1, "rank 2 was killed"))
    scene.do(node.WorkerSaid(3, local.WorkerHalted(1, 8, (7, 8))))


def in_place(generation: int, *ranks: int) -> m.Start:
    return msgspec.structs.replace(start(generation), line=LINE, survivors=ranks)


def test_living_rank_is_told_and_the_dead_one_forked() -> None:
    scene = test_node.Scene().looping()
    survivors(scene)
    report = node.report(scene.state, scene.pages)
    assert report.halted
    assert not report.stopped
    assert [(rank.live, rank.kept) for rank in report.ranks] == [(8, (7, 8))]
    state, actions = node.step(scene.state, node.Said(in_place(2, 3)), 0.0, scene.pages)
    assert actions[:2] == (node.Continue(in_place(2, 3), (3,)), node.Fork(in_place(2, 3), (2,)))
    assert state.workers[3].pid == 103
    assert state.workers[2].pid == 0


def test_worker_that_never_came_into_its_loop_is_not_kept() -> None:
    scene = test_node.Scene().started()
    lines = scene.say(m.Halt(1, 1, "rank 2 was killed"))
    assert "KillRanks" in lines
    scene.exited(2)
    scene.exited(3)
    assert node.report(scene.state, scene.pages).stopped


def test_worker_that_does_not_stand_still_is_killed_alone() -> None:
    scene = test_node.Scene().looping()
    scene.pages[2] = scene.pages[3] = (8, Phase.STEP)
    scene.exited(2, step=8)
    scene.say(m.Halt(1, 1, "rank 2 was killed"))
    scene.now = 5.0
    assert "KillRanks" not in scene.do(node.Beat())
    scene.now = 11.0
    assert "KillRanks" in scene.do(node.Beat())


def test_survivor_that_dies_before_it_is_told_is_reported_in_the_new_generation() -> None:
    scene = test_node.Scene().looping()
    survivors(scene)
    scene.exited(3, step=8)
    scene.say(in_place(2, 3))
    report = node.report(scene.state, scene.pages)
    assert report.generation == 2
    assert [exit.rank for exit in report.exits] == [3]


def test_survivor_that_an_order_of_before_ended_has_failed_in_the_new_generation() -> None:
    scene = test_node.Scene().looping()
    survivors(scene)
    scene.say(m.Stop(1, 1, "its generation is over", 0.0))  # it was sent before the coordinator heard of the survivor
    scene.say(in_place(2, 3))
    assert node.report(scene.state, scene.pages).generation == 1  # it is about to end
    scene.exited(3, step=8)
    scene.say(in_place(2, 3))
    report = node.report(scene.state, scene.pages)
    assert report.generation == 2
    assert [(exit.rank, exit.failed) for exit in report.exits] == [(3, True)]


def test_halted_word_of_an_older_generation_is_not_believed() -> None:
    scene = test_node.Scene().looping()
    survivors(scene)
    scene.say(in_place(2, 3))
    scene.do(node.WorkerSaid(3, local.WorkerHalted(1, 8, (7, 8))))
    assert scene.state.workers[3].halted is None


def test_slot_that_the_run_would_go_on_from_is_not_filled_again() -> None:
    scene = test_node.Scene().looping()
    first = m.Attempt(1, 4, 1)
    assert scene.say(m.Arm(1, first, persist=False)) == ["arm 4 slot 0"]
    scene.do(node.Armed(first, True, 1))
    for rank, said in ((2, []), (3, ["say Sealed"])):
        assert scene.do(node.WorkerSaid(rank, local.WorkerSealed(1, m.Cost(0.0)))) == said
    assert node.report(scene.state, scene.pages).held == (first,)
    second, third = m.Attempt(1, 6, 2), m.Attempt(1, 8, 3)
    assert scene.say(m.Arm(1, second, persist=False, stays=(first,))) == ["arm 6 slot 1"]
    scene.do(node.Armed(second, False, 6))
    assert scene.say(m.Arm(1, third, persist=False, stays=(first,))) == ["arm 8 slot 1"]


def test_snapshot_that_the_run_goes_on_from_is_held_and_not_sent_before_the_coordinator_says_so_again() -> None:
    scene = test_node.Scene().looping()
    first = m.Attempt(1, 4, 1)
    scene.say(m.Arm(1, first, persist=False))
    scene.do(node.Armed(first, True, 1))
    for rank in (2, 3):
        scene.do(node.WorkerSaid(rank, local.WorkerSealed(1, m.Cost(0.0))))
    scene.say(m.Copy(1, first))
    assert scene.state.copied == {0: first}
    survivors(scene)
    scene.say(in_place(2, 3))
    assert (scene.state.held, scene.state.copied) == ({0: first}, {})
    scene.say(m.Copy(1, first))
    assert scene.state.copied == {0: first}


def test_attempt_of_the_generation_before_is_still_persisted() -> None:
    scene = test_node.Scene().armed()
    for rank in (2, 3):
        scene.do(node.WorkerSaid(rank, local.WorkerSealed(1, m.Cost(0.0))))
    survivors(scene)
    scene.say(in_place(2, 3))
    assert "say Prepared" in scene.do(node.Persisted(ATTEMPT, test_node.pack(2)))


# ------------------------------------------------------------------------------------------------------------ places


def a_node(name: str, node_rank: int = -1, joined_at: float = 0.0) -> Node:
    return Node(m.Hello(name, node_rank, 2, "", name, 1, "run", "job", "1", 0), joined_at, 100.0)


def before(*names: str) -> Generation:
    return Generation(1, tuple(Member(name, -1, place, 2 * place, 2) for place, name in enumerate(names)))


def test_newcomer_takes_the_place_of_the_node_that_is_gone() -> None:
    found = form(FormationPolicy(3, 3), [a_node("c"), a_node("a"), a_node("new")], before("a", "b", "c"), 2, 0.0, 10.0)
    assert isinstance(found, Generation)
    assert [member.node for member in found.members] == ["a", "new", "c"]
    assert same_places(before("a", "b", "c"), found)


def test_fewer_nodes_are_other_places() -> None:
    found = form(FormationPolicy(1, 3), [a_node("a"), a_node("c")], before("a", "b", "c"), 2, 0.0, 10.0)
    assert isinstance(found, Generation)
    assert not same_places(before("a", "b", "c"), found)


def test_who_was_there_stays_when_more_come_than_are_needed() -> None:
    nodes = [a_node("new", joined_at=-5.0), a_node("a"), a_node("b")]
    found = form(FormationPolicy(2, 2), nodes, before("a", "b"), 2, 0.0, 10.0)
    assert isinstance(found, Generation)
    assert [member.node for member in found.members] == ["a", "b"]


def test_damage_where_nothing_can_be_passed_over_uses_up_the_budget() -> None:
    scene = Scene().started()
    error = m.ErrorReport("ftrain.errors.CorruptCheckpoint", "the arena is damaged", "", "train.py:1", 1.0)
    exits = (msgspec.structs.replace(dead("a", -1, (), signal=0), code=1, error=error),)
    scene.report("a", exits=exits, stopped=True)
    scene.report("b", stopped=True)
    assert scene.state.budget.without_progress == 1


def test_worker_that_was_held_for_a_coordinator_that_is_gone_goes_on() -> None:
    scene = test_node.Scene().looping()
    scene.say(m.Arm(1, ATTEMPT, hold=True))
    scene.do(node.Armed(ATTEMPT, True, 4))
    lines = scene.say(m.Arm(1, m.Attempt(1, 20, 2)))
    assert lines == ["verdict go on", "arm 20 slot 1"]


def test_script_that_raises_on_the_way_back_is_begun_anew_with_new_processes_only() -> None:
    """A rank that comes back alone would raise again, and again, until the run was given up."""
    scene = in_loop(Scene().started(), 8)
    scene.report("a", exits=(dead("a", 8, (7, 8)),), stopped=True)
    assert "continues at 8 from live, 1 kept, 1 new" in halted(scene, "b", 8)
    scene.stored()
    scene.say("a", m.StoreReady(2, "10.0.0.1", 29400))
    error = m.ErrorReport("ftrain.errors.Unrecoverable", "a hook", "", "ddp.py:7", scene.now)
    newcomer = m.RankExit(0, 0, 7, 1, 0, -1, int(Phase.JOINED), error, scene.now, kept=(7, 8), shard="all")
    scene.report("a", exits=(newcomer,), stopped=True)
    halted(scene, "b", 8)
    lines = scene.wait(5.0)
    assert not any(line.startswith("continues") for line in lines)
    assert {"a <- Stop 2", "b <- Stop 2"} <= set(lines)
    lines = scene.report("b", stopped=True)
    assert any("0 kept, 2 new" in line for line in lines), lines
    assert not scene.state.survivors
    assert not scene.state.afresh

"""Which rank hangs, as a table of situations, in virtual time."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from ftrain.core import hangs, node, run_state, supervision
from ftrain.core import messages as m
from ftrain.core.hangs import Cut, Kill, Look, Usage, Watch
from ftrain.core.page import Collective, Phase
from ftrain.core.run_state import Phase as RunPhase
from ftrain.core.supervision import FailureClass
from tests.core import test_node
from tests.core.scene import NODES, Scene

LOOKS_PER_SECOND = 4
STEPS = (0.1, 0.1, 0.5)  # seconds that the latest ones took


def look(step: int = 8, collective: int = 50, **more: object) -> Look:
    return Look(step, Phase.STEP, collective, Collective.ALLREDUCE, 48, STEPS, **more)  # type: ignore[arg-type]


def usage(cpu: float = 1.0, io: int = 0, processes: frozenset[int] = frozenset({7}), at_work: bool = False) -> Usage:
    return Usage(cpu, io, processes, at_work)


def watched(
    seconds: float, *, stopped: bool = False, excused: bool = False, cpu: float = 0.0, io: float = 0.0
) -> Watch:
    """A rank that did not move for so long, and used so much a second."""
    found: Watch | None = None
    for number in range(int(seconds * LOOKS_PER_SECOND) + 1):
        now = number / LOOKS_PER_SECOND
        used = usage(cpu * now, int(io * now)) if found is not None and found.wants_usage(now) else None
        found = hangs.watch(found, look(stopped=stopped, excused=excused, usage=used), now)
    assert found is not None
    return found


# --------------------------------------------------------------------------------------------------------- one rank


def test_rank_that_moves_stands_still_for_no_time() -> None:
    found = hangs.watch(watched(10.0), look(collective=51), 10.25)
    assert (found.still_seconds, found.idle_seconds) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("cpu", "io", "idle"),
    [
        (0.0, 0.0, True),
        (0.003, 0.0, True),  # a watchdog
        (0.0, 1000.0, True),
        (0.1, 0.0, False),
        (1.0, 0.0, False),
        (0.0, 100_000.0, False),
    ],
)
def test_process_is_idle_when_it_uses_next_to_nothing(cpu: float, io: float, idle: bool) -> None:
    assert (watched(30.0, cpu=cpu, io=io).idle_seconds > 25.0) == idle


def test_process_with_new_children_is_not_idle() -> None:
    found = hangs.watch(watched(30.0), look(usage=usage(0.0, processes=frozenset({7, 8}))), 30.25)
    assert found.idle_seconds == 0.0


def test_process_that_wants_to_run_or_waits_for_a_disk_is_not_idle() -> None:
    found = hangs.watch(watched(30.0), look(usage=usage(0.0, at_work=True)), 30.25)
    assert found.idle_seconds > 25.0  # seen by chance
    found = hangs.watch(found, look(usage=usage(0.0, at_work=True)), 31.25)
    assert found.idle_seconds == 0.0


def test_time_that_the_agent_slept_through_does_not_count() -> None:
    found = hangs.watch(watched(2.0, stopped=True), look(stopped=True), 3600.0)
    assert found.still_seconds == found.stopped_seconds == 2.0 + hangs.GAP_SECONDS_MAX


@pytest.mark.parametrize("what", ["still_seconds", "stopped_seconds", "idle_seconds"])
def test_rank_that_is_allowed_to_be_quiet_is_not_counted(what: str) -> None:
    assert getattr(watched(60.0, stopped=True, excused=True), what) == 0.0


def test_stopped_rank_hangs_after_two_steps_of_the_median_and_a_moment() -> None:
    bound = hangs.STOPPED_SECONDS + 2 * 0.1
    assert hangs.stopped_too_long(watched(bound - 0.25, stopped=True), [watched(1.0)]) is None
    hang = hangs.stopped_too_long(watched(bound + 0.25, stopped=True), [watched(1.0)])
    assert hang is not None
    assert "stopped (SIGSTOP)" in hang.text
    assert "in step 8 (after allreduce, number 2 of the step)" in hang.text


def test_stopped_rank_is_given_longer_where_no_step_was_done_yet() -> None:
    assert hangs.stopped_too_long(watched(5.0, stopped=True), []) is None
    assert hangs.stopped_too_long(watched(11.0, stopped=True), []) is not None


@pytest.mark.parametrize(("phase", "awaited", "hangs_there"), [
    (Phase.BOOT, False, False),  # a script that never joins
    (Phase.BOOT, True, True),
    (Phase.RESTORING, False, True),
    (Phase.DONE, True, False),
])  # fmt: skip
def test_stopped_rank_that_others_wait_for_hangs_before_it_has_joined(
    phase: Phase, awaited: bool, hangs_there: bool
) -> None:
    found = watched(11.0, stopped=True)
    found = replace(found, look=replace(found.look, phase=phase))
    assert (hangs.stopped_too_long(found, [], awaited) is not None) == hangs_there


def test_running_rank_is_never_taken_for_stopped() -> None:
    assert hangs.stopped_too_long(watched(1000.0), [watched(1000.0)]) is None


# --------------------------------------------------------------------------------------------------------- all ranks


def rank(number: int, step: int = 8, phase: Phase = Phase.STEP, **more: object) -> m.RunningRank:
    """One that stood still for 100 s with its process idle, before its second collective of the step."""
    fields = {"collective": 49, "kind": Collective.ALLREDUCE, "mark": 48, "still_seconds": 100.0, "idle_seconds": 99.0}
    progress = m.Progress(**{**fields, "median_seconds": 0.1, "slowest_seconds": 0.5, **more})  # type: ignore[arg-type]
    return m.RunningRank(number, 0, 7, step, phase, joined=True, looped=True, progress=progress)


def ahead(number: int, **more: object) -> m.RunningRank:
    return rank(number, collective=50, **more)  # type: ignore[arg-type]


def coming(number: int, seconds: float = 61.0, phase: Phase = Phase.RESTORING, **more: object) -> m.RunningRank:
    return rank(number, phase=phase, **{"still_seconds": seconds, "idle_seconds": seconds, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "hang"), [
    ([coming(0), coming(1)], True),
    ([coming(0), coming(1, phase=Phase.STEP)], True),  # it is there already
    ([coming(0), coming(1, 59.0)], False),
    ([coming(0), coming(1, idle_seconds=0.0)], False),
    ([coming(0), coming(1, stopped=True)], False),  # its agent sees to that
    ([coming(0), coming(1, slowest_seconds=12.0)], False),
    ([coming(0), coming(1, slowest_seconds=0.0)], False),  # a newcomer: all it does is for the first time
    ([coming(0, 301.0), coming(1, 301.0, slowest_seconds=0.0)], True),
    ([coming(0), coming(1, phase=Phase.JOINED)], False),  # its script may do anything
    ([coming(0, 301.0), coming(1, 301.0, phase=Phase.BOOT)], True),
    ([coming(0), m.RunningRank(1, 0, 7, 8, Phase.BOOT)], False),  # not looked at yet
])  # fmt: skip
def test_ranks_hang_on_their_way_when_none_does_anything(ranks: list[m.RunningRank], hang: bool) -> None:
    assert (hangs.judge_arrival(ranks) is not None) == hang
    assert hangs.judge_arrival(ranks, factor=6.0) is None


BUSY = {"idle_seconds": 0.0}

SITUATIONS = {
    # Behind, in the same step.
    "idle rank, another in a collective": ([rank(0), ahead(1)], "kill 0"),
    "the same, nobody waits yet": ([rank(0), ahead(1, still_seconds=5.0)], ""),
    "the same, not for long": ([rank(0, still_seconds=15.0, idle_seconds=14.0), ahead(1)], ""),
    "idle rank, steps are slow": ([rank(0, slowest_seconds=12.0), ahead(1)], ""),
    "idle rank, the other's steps are slow": ([rank(0), ahead(1, slowest_seconds=12.0)], ""),
    "busy rank": ([rank(0, **BUSY), ahead(1)], ""),
    "busy rank, for very long": ([rank(0, **BUSY, still_seconds=700.0), ahead(1, still_seconds=700.0)], "kill 0"),
    "busy rank, nobody waits so long": ([rank(0, **BUSY, still_seconds=700.0), ahead(1)], ""),
    "first step of its process": ([rank(0, median_seconds=0.0, slowest_seconds=0.0), ahead(1)], ""),
    "first step, five minutes idle": (
        [rank(0, slowest_seconds=0.0, idle_seconds=301.0), ahead(1, still_seconds=301.0)],
        "kill 0",
    ),
    "stopped rank": ([rank(0, stopped=True), ahead(1)], ""),  # its agent sees to that
    "one of four": ([ahead(0), ahead(1), rank(2), ahead(3)], "kill 2"),
    "two of four, both idle": ([rank(0), ahead(1), rank(2), ahead(3)], "cut by 0"),
    "two of four, one at work": ([rank(0, **BUSY), ahead(1), rank(2), ahead(3)], ""),
    # Behind by a step.
    "idle rank a step behind": ([rank(0, step=7), rank(1)], "kill 0"),
    "idle rank at its boundary": ([rank(0, step=7, phase=Phase.BOUNDARY), rank(1)], "kill 0"),
    "rank that waits for a verdict": ([rank(0, step=7, phase=Phase.HOLD), rank(1)], ""),
    "rank that is done": ([rank(0, step=7, phase=Phase.DONE), rank(1)], ""),
    "all others wait for the end": ([rank(0, step=7), rank(1, phase=Phase.LAST)], "kill 0"),
    # Sub-groups: numbers of one step cannot be compared.
    "ranks that do not move in lockstep": ([rank(0, mark=40), ahead(1)], "cut"),
    "the same, one is at work": ([rank(0, mark=40, **BUSY), ahead(1)], ""),
    "the same, a step behind": ([rank(0, step=7, mark=40), ahead(1)], "kill 0"),
    "point to point": ([rank(0, kind=Collective.SEND), ahead(1, kind=Collective.RECV)], "cut"),
    "first step in a loop": ([rank(0, mark=0), ahead(1, mark=0)], "cut"),
    # Nobody behind.
    "all in a collective": ([ahead(0), ahead(1)], "cut"),
    "all in a collective, not for long": ([ahead(0, idle_seconds=14.0), ahead(1)], ""),
    "all in a collective, one at work": ([ahead(0), ahead(1, **BUSY)], ""),
    "all spin in a collective for half an hour": (
        [ahead(0, **BUSY, still_seconds=1801.0), ahead(1, **BUSY, still_seconds=1801.0)],
        "cut",
    ),
    "all load data": ([rank(0, collective=48), rank(1, collective=48)], ""),
    "all evaluate for an hour": (
        [rank(0, collective=48, **BUSY, still_seconds=3600.0), rank(1, collective=48, **BUSY, still_seconds=3600.0)],
        "",
    ),
    "one rank alone": ([ahead(0)], ""),
    "one of them is allowed to be quiet": ([ahead(0, still_seconds=0.0, idle_seconds=0.0), ahead(1)], ""),
    "one was not seen yet": ([msgspec.structs.replace(rank(0), progress=None), ahead(1)], ""),
    "one stands still already": ([msgspec.structs.replace(rank(0), halted=True), ahead(1)], ""),
    "nobody": ([], ""),
}


def in_words(verdict: Kill | Cut | None) -> str:
    match verdict:
        case Kill(number):
            return f"kill {number}"
        case Cut(_, number):
            return f"cut by {number}" if number >= 0 else "cut"
    return ""


@pytest.mark.parametrize(("ranks", "expected"), SITUATIONS.values(), ids=SITUATIONS.keys())
def test_situation_is_judged_as_expected(ranks: list[m.RunningRank], expected: str) -> None:
    assert in_words(hangs.judge(ranks)) == expected


def test_bounds_grow_with_hangs_that_brought_no_new_step() -> None:
    ranks = [rank(0), ahead(1)]
    assert [in_words(hangs.judge(ranks, hangs.leniency(times))) for times in range(3)] == ["kill 0", "kill 0", ""]
    assert hangs.leniency(1000) == hangs.leniency(3) == 64.0


def test_explanation_says_who_where_how_long_and_who_waited() -> None:
    verdict = hangs.judge([rank(0), *map(ahead, range(1, 12))])
    assert isinstance(verdict, Kill)
    exit = m.RankExit(0, 0, 7, 0, 9, 8, int(Phase.STEP), hang=verdict.hang)
    failure = supervision.explain("a", exit)
    assert failure.kind is FailureClass.HANG
    assert failure.summary == (
        "rank 0 hung: it stood still for 100 s in step 8 (after allreduce, number 1 of the step), its process "
        "used no processor and did no I/O, while ranks 1, 2, 3, 4, 5, 6, 7, 8 waited"
    )


# ---------------------------------------------------------------------------------------- the coordinator, the agent


def judged(scene: Scene, *ranks: m.RunningRank) -> list[str]:
    """What follows in the heartbeat's time after the nodes have reported these ranks."""
    for name, found in zip(NODES, ranks, strict=True):
        scene.report(name, ranks=(found,), looping=True, first_step=0)
    return scene.wait(1.0)


def test_coordinator_has_the_hung_rank_killed_and_says_why_the_generation_ended() -> None:
    scene = Scene().running()
    assert judged(scene, rank(0), ahead(1)) == ["a <- KillRank"]
    assert judged(scene, rank(0), ahead(1)) == ["a <- KillRank"]  # the first one may have been lost
    exit = m.RankExit(0, 0, 7, 0, 9, 8, int(Phase.STEP), hang=m.Hang("it was stopped"))
    scene.report("a", exits=(exit,), stopped=True)
    assert scene.state.failure is not None
    assert scene.state.failure.kind is FailureClass.HANG
    assert scene.state.failure.summary == "rank 0 hung: it was stopped, while rank 1 waited"
    assert (scene.state.hangs, scene.state.hung_step) == (1, 8)


def test_coordinator_looks_once_in_a_heartbeat_only() -> None:
    scene = Scene().running()
    assert judged(scene, rank(0), ahead(1)) == ["a <- KillRank"]
    assert scene.wait(0.5) == []
    assert scene.wait(0.5) == ["a <- KillRank"]


def test_coordinator_ends_the_generation_in_place_when_nobody_is_behind() -> None:
    scene = Scene().running()
    assert {"a <- Halt", "b <- Halt"} <= set(judged(scene, ahead(0), ahead(1)))
    assert scene.state.phase is RunPhase.HALTING
    assert scene.state.failure is not None
    assert scene.state.failure.kind is FailureClass.LINK


def waits(seconds: float, collective: int = 51) -> m.RunningRank:
    return rank(0, collective=collective, mark=50, still_seconds=seconds, idle_seconds=0.0, slowest_seconds=0.5)


def desert(scene: Scene, waiting: m.RunningRank) -> list[str]:
    """Node 1 is gone, and does not come back; what node 0 has to say of its rank then."""
    scene.report("b", ranks=(ahead(1),), looping=True)
    scene.do(run_state.Disconnected("b"))
    scene.now += 3.0
    return scene.report("a", ranks=(waiting,), looping=True)


def test_ranks_that_wait_for_a_node_whose_channel_broke_do_not_wait_for_its_lease() -> None:
    """Their connection to its ranks may not tell."""
    scene = Scene().running()
    assert "a <- Halt" in desert(scene, waits(1.1))
    halted = msgspec.structs.replace(waits(1.1), halted=True, looped=True)
    scene.report("a", ranks=(halted,), halted=True)
    assert scene.now < scene.state.nodes["b"].lease_until
    assert "interrupted at 8: node 1 was lost: its agent's channel closed" in scene.log


@pytest.mark.parametrize("waiting", [waits(0.9), waits(60.0, collective=50)])
def test_ranks_that_come_on_or_wait_for_nobody_need_no_node_whose_channel_broke(waiting: m.RunningRank) -> None:
    scene = Scene().running()
    assert "a <- Halt" not in desert(scene, waiting)
    assert scene.state.phase is RunPhase.RUNNING


def test_node_that_comes_back_in_time_is_waited_for() -> None:
    scene = Scene().running()
    scene.report("b", ranks=(ahead(1),), looping=True)
    scene.do(run_state.Disconnected("b"))
    scene.now += 1.0
    scene.hello("b", scene.state.reports["b"])
    scene.now += 3.0
    assert "a <- Halt" not in scene.report("a", ranks=(waits(3.0),), looping=True)


def test_coordinator_does_not_judge_a_run_that_is_leaving() -> None:
    scene = Scene().running()
    scene.do(run_state.Received("b", m.Notice("SIGTERM", 30.0)))
    assert "a <- KillRank" not in judged(scene, rank(0), ahead(1))


def order(step: int = 8, collective: int = 50, generation: int = 1) -> m.KillRank:
    return m.KillRank(1, generation, 2, step, collective, m.Hang("it stood still"))


def seen(scene: test_node.Scene, seconds: float, **more: object) -> list[str]:
    lines: list[str] = []
    for _ in range(int(seconds * LOOKS_PER_SECOND)):
        scene.now += 1 / LOOKS_PER_SECOND
        lines += scene.do(node.Looked({2: look(**more), 3: look()}))  # type: ignore[arg-type]
    return lines


def test_agent_kills_the_rank_that_it_is_told_to_once_it_has_said_where_it_is() -> None:
    scene = test_node.Scene().looping()
    seen(scene, 1.0)
    assert scene.say(order(), order()) == ["Show", "DumpStack"]
    assert scene.do(node.Dumped(2, 999, "of another process")) == []
    assert scene.do(node.Dumped(2, 102, "File train.py")) == ["KillRanks"]
    scene.exited(2)
    exit = scene.state.workers[2].exit
    assert exit is not None
    assert exit.failed  # not as one that was told to end
    assert exit.hang == m.Hang("it stood still", stack="File train.py")


@pytest.mark.parametrize("late", [order(step=7), order(collective=49), order(generation=2)])
def test_agent_spares_a_rank_that_went_on_meanwhile(late: m.KillRank) -> None:
    scene = test_node.Scene().looping()
    seen(scene, 1.0)
    assert scene.say(late) == []


def test_agent_spares_a_rank_that_it_has_just_seen_move() -> None:
    scene = test_node.Scene().looping()
    seen(scene, 0.25)
    assert scene.say(order()) == []


def test_agent_kills_a_stopped_rank_by_itself() -> None:
    scene = test_node.Scene().looping()
    assert seen(scene, 2.0, stopped=True) == ["Show", "KillRanks"]
    scene.exited(2)
    exit = scene.state.workers[2].exit
    assert exit is not None
    assert exit.hang is not None
    assert exit.failed


def test_agent_reports_where_its_ranks_stand_still() -> None:
    scene = test_node.Scene().looping()
    seen(scene, 2.0)
    progress = node.report(scene.state, scene.pages).ranks[0].progress
    assert progress == m.Progress(50, Collective.ALLREDUCE, 48, 1.75, 0.0, False, 0.1, 0.5)


def test_worker_that_never_joined_may_be_stopped() -> None:
    scene = test_node.Scene().connected()
    scene.say(test_node.start(1))
    scene.do(node.Forked(2, 102))
    assert seen(scene, 20.0, stopped=True) == []

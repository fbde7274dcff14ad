"""A node's own view of its lease, as scripted histories: silent channels, and ranks that wait in vain."""

from __future__ import annotations

from ftrain.core import hangs, local, node, node_lease
from ftrain.core import messages as m
from ftrain.core.page import Phase
from tests.core.test_node import Scene

LEASE_SECONDS, BEAT_SECONDS, LOOK_SECONDS = 10.0, 1.0, 0.25


class Node(Scene):
    """Two ranks in their loops. `heard` says whether the coordinator answers, `steps` whether the ranks come on."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = True
        self.steps = True
        self.at_work = False
        self.excused = False
        self.recent_seconds: tuple[float, ...] = (0.1,)
        self.step = 0
        self.looping()

    def passes(self, seconds: float) -> list[str]:
        """Time in which heartbeats are sent and ranks are looked at. Returns what else is done."""
        done: list[str] = []
        until = self.now + seconds
        while self.now + LOOK_SECONDS <= until:
            self.now += LOOK_SECONDS
            self.step += self.steps
            done += self.do(node.Looked({rank: self._look() for rank in (2, 3)}))
            if self.now % BEAT_SECONDS == 0:
                done += self.do(node.Beat())
                if self.heard and self.state.connected:
                    self.say(m.Heard(self.state.term, self.state.beat))
        return [line for line in done if line != "say Heartbeat"]

    def _look(self) -> hangs.Look:
        usage = hangs.Usage(self.now if self.at_work else 0.0, 0, frozenset({7}), self.at_work)
        return hangs.Look(
            self.step, Phase.STEP, 1, recent_seconds=self.recent_seconds, excused=self.excused, usage=usage
        )

    def cut(self, steps: bool = False) -> None:
        self.heard, self.steps = False, steps


def test_channel_that_answers_is_kept_and_a_silent_one_is_made_anew() -> None:
    scene = Node()
    assert scene.passes(60.0) == []
    scene.cut(steps=True)
    assert scene.passes(5.0) == []
    assert scene.passes(1.0) == ["Show", "Reconnect"]
    assert not scene.state.connected
    assert scene.passes(60.0) == []  # nothing more until there is another one
    scene.do(node.Connected())
    assert scene.passes(6.0) == ["Show", "Reconnect"]  # where not even the Hello was answered


def test_ranks_that_wait_in_vain_stand_still_before_the_coordinator_counts_the_lease_as_over() -> None:
    scene = Node()
    scene.passes(20.0)
    scene.cut()
    assert "RevokePages" in scene.passes(LEASE_SECONDS - BEAT_SECONDS)
    for rank in (2, 3):
        scene.do(node.WorkerSaid(rank, local.WorkerHalted(1, scene.step, ())))
    report = node.report(scene.state, scene.pages)
    assert report.halted
    assert not report.stopped
    assert "RevokePages" not in scene.passes(60.0)


def test_ranks_that_come_on_are_left_alone_however_long_nothing_is_heard() -> None:
    scene = Node()
    scene.cut(steps=True)
    assert "RevokePages" not in scene.passes(300.0)
    scene.steps = False  # and the day comes on which they do not
    assert "RevokePages" in scene.passes(6.0)


def test_ranks_that_work_or_may_be_quiet_are_not_taken_for_waiting() -> None:
    for scene in (compiling := Node(), evaluating := Node(), quiet := Node()):
        scene.passes(20.0)
        scene.at_work = True
        scene.cut()
    compiling.recent_seconds = ()
    evaluating.recent_seconds = (40.0,)
    quiet.at_work, quiet.excused = False, True
    for scene in (compiling, evaluating, quiet):
        assert "RevokePages" not in scene.passes(60.0)
    assert "RevokePages" in evaluating.passes(30.0)  # twice as long as the slowest step
    compiling.at_work = False
    assert "RevokePages" in compiling.passes(8.0)


def test_answer_of_a_former_coordinator_keeps_the_channel_but_renews_nothing() -> None:
    scene = Node()
    scene.passes(20.0)
    leased_at = scene.state.leased_at
    scene.heard = False
    for _ in range(30):
        scene.passes(1.0)
        scene.say(m.Heard(scene.state.term - 1, scene.state.beat))
    assert scene.state.connected
    assert scene.state.leased_at == leased_at


def test_lease_counts_from_when_the_answered_heartbeat_was_sent() -> None:
    scene = Node()
    scene.passes(3.0)
    scene.heard = False
    scene.passes(2.0)
    beat, sent_at = scene.state.beat - 1, scene.now - 1.0
    scene.say(m.Heard(scene.state.term, beat))
    assert scene.state.leased_at == sent_at
    scene.say(m.Heard(scene.state.term, beat), m.Heard(scene.state.term, 999), m.Heard(scene.state.term, beat - 1))
    assert scene.state.leased_at == sent_at
    assert list(scene.state.unanswered) == [beat + 1]


def test_node_that_was_cut_off_goes_on_in_place_with_the_next_start() -> None:
    scene = Node()
    scene.cut()
    scene.passes(20.0)
    for rank in (2, 3):
        scene.do(node.WorkerSaid(rank, local.WorkerHalted(1, scene.step, ())))
    scene.do(node.Connected(), node.Said(m.Welcome("run", 1, LEASE_SECONDS, BEAT_SECONDS)))
    line = m.Line(scene.step, m.Tier.LIVE)
    again = m.Start(1, 2, 1, 2, 2, 4, "b", "10.0.0.2", 29400, 0, 0, None, line, (2, 3))
    assert scene.say(again) == ["Continue"]
    assert not scene.state.halting
    scene.heard = scene.steps = True
    assert scene.passes(30.0) == []


def test_node_without_ranks_in_their_loops_has_none_to_stand_still() -> None:
    scene = Scene().started()
    scene.now = 1000.0
    assert not node_lease.is_cut_off(scene.state, scene.now)

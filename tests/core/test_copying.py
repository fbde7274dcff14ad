"""How often snapshots are kept in memory by themselves, and which of them stay while copies go to other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from ftrain.core import copying, run_state, schedule
from ftrain.core import messages as m
from ftrain.core.layout import Mesh, TensorSpec
from ftrain.core.messages import Cost
from ftrain.core.schedule import Cadence, CheckpointPolicy
from ftrain.core.write_plan import has_only_replicas
from tests.core import scene as scenes

AUTO = CheckpointPolicy(0, 3600.0, snapshot_seconds=10.0, snapshot_auto=True)
QUICK = 0.001  # seconds that a cheap snapshot takes
PACE = schedule.PACE_SECONDS_MIN


class Scene(scenes.Scene):
    """Two nodes of one rank each whose ranks and keepers say what they have."""

    sending_seconds = 0.0  # of a processor, that a copy took of each node
    step_seconds = 1.0

    def __init__(
        self, shards: Sequence[str] = "xy", slots: int = 3, peer_port: int = 7, policy: CheckpointPolicy = AUTO
    ) -> None:
        super().__init__(replace(scenes.POLICY, checkpoint=policy))
        self.shards, self.slots, self.peer_port = shards, slots, peer_port
        self.held: tuple[m.Attempt, ...] = ()
        self.kept: tuple[m.Attempt, ...] = ()  # by each of the other
        self.step = 0
        self.sent: list[m.Attempt] = []  # what other nodes were to have, in turn
        self.running()

    def do(self, event: run_state.Event) -> list[str]:
        lines = super().do(event)
        if {"a <- Copy", "b <- Copy"} <= set(lines):
            assert self.state.copying is not None
            self.sent.append(self.state.copying)
        return lines

    def steps(self, node: str, step: int, **fields: object) -> list[str]:
        own = scenes.NODES.index(node)
        rank = m.RunningRank(own, 0, 7, step, 3, True, looped=True, shard=self.shards[own], slots=self.slots)
        keeps = (m.Kept(1 - own, attempts=self.kept, shard=self.shards[1 - own]),)
        held = tuple(sorted(self.held))
        fields |= {"sending_seconds": self.sending_seconds}
        return self.report(node, ranks=(rank,), looping=True, first_step=0, held=held, keeps=keeps, **fields)

    def next_step(self, seconds: float = 0.0) -> list[str]:
        """All ranks finish a step."""
        seconds = seconds or self.step_seconds
        lines = self.wait(seconds / 2)
        self.now += seconds / 2
        self.step += 1
        return lines + [line for node in scenes.NODES for line in self.steps(node, self.step)]

    def snapshot(self, seconds: float = QUICK) -> m.Arm:
        """The snapshot under way, or that of the next step, is taken. It costs each rank so much."""
        if self.state.barrier is None:
            self.next_step()
        sent, attempt = self.arm_sent(), self.armed()
        while self.step < attempt.step:
            self.next_step()
        self.held = (*(one for one in self.held if one in sent.stays), attempt)
        for rank, node in enumerate(scenes.NODES):
            self.say(node, m.Sealed(attempt, (rank,), Cost(seconds / 100, seconds)))
        return sent

    def until_sent(self) -> m.Attempt:
        """Snapshots, until one is to go to other nodes."""
        before = len(self.sent)
        while len(self.sent) == before:
            self.snapshot()
        return self.sent[-1]

    def commit_due(self) -> None:
        self.state = msgspec.structs.replace(self.state, cadence=replace(self.state.cadence, due=self.now))
        self.wait(PACE)


def test_ranks_without_replicas_take_a_snapshot_after_each_step() -> None:
    scene = Scene(peer_port=0)
    steps = [scene.snapshot().attempt.step for _ in range(5)]
    assert steps == [1, 2, 3, 4, 5]


def test_commit_that_is_far_ahead_gives_way_to_snapshots() -> None:
    """It was armed while nobody had said yet what the ranks hold."""
    scene = Scene(shards=("", ""), peer_port=0, policy=replace(AUTO, every_steps=1000, every_seconds=0.0))
    scene.next_step()
    assert scene.armed().step == 1000
    scene.shards = "xy"
    scene.next_step()
    steps = [scene.snapshot() for _ in range(5)]
    assert not any(sent.persist for sent in steps)
    assert [sent.attempt.step for sent in steps[1:]] == [one.attempt.step + 1 for one in steps[:-1]]


def test_rank_that_is_alone_leaves_nobody_to_go_on() -> None:
    scene = Scene()
    assert copying.policy(scene.state, scene.now).snapshot_steps
    (first, _) = scene.state.generation.members
    alone = replace(scene.state.generation, members=(first,))
    scene.state = msgspec.structs.replace(scene.state, generation=alone)
    assert not copying.policy(scene.state, scene.now).snapshot_steps


def test_replicas_take_one_every_ten_seconds() -> None:
    scene = Scene(shards="xx")
    for _ in range(8):
        assert scene.next_step() == []
    scene.next_step(3.0)
    scene.snapshot()
    assert scene.sent == [], "a replica on another node is as good as a copy"


def test_snapshots_that_cost_much_are_less_frequent() -> None:
    scene = Scene(peer_port=0)
    steps = [scene.snapshot(seconds=1.0).attempt.step for _ in range(8)]
    assert steps[-1] - steps[-2] == 4, "a quarter of the time at most is to be spent on copying"
    stalls = schedule.paced(Cadence(pace_seconds=5.0), Cost(stall_seconds=0.05, staging_seconds=0.1))
    assert stalls.pace_seconds == pytest.approx(5.0)


def test_copying_with_processors_that_training_wants_counts_as_a_stall() -> None:
    idle = schedule.paced(Cadence(pace_seconds=1.0), Cost(0.001, 0.1, 0.0))
    wanted = schedule.paced(Cadence(pace_seconds=1.0), Cost(0.001, 0.1, 0.1))
    assert idle.pace_seconds == pytest.approx((1.0 + 0.4) / 2)
    assert wanted.pace_seconds == pytest.approx((1.0 + 10.1) / 2)


def test_one_slow_snapshot_is_no_rule() -> None:
    cadence = schedule.paced(Cadence(), Cost(0.0, 2.0))
    assert cadence.pace_seconds == pytest.approx((PACE + 8.0) / 2)
    for _ in range(4):
        cadence = schedule.paced(cadence, Cost(0.0, 0.01))
    assert cadence.pace_seconds < 0.5


def test_one_snapshot_at_a_time_goes_to_other_nodes_and_stays_meanwhile() -> None:
    scene = Scene()
    first = scene.snapshot()
    assert scene.sent == [first.attempt]
    between = [scene.snapshot() for _ in range(4)]
    assert scene.sent == [first.attempt]
    assert all(first.attempt in sent.stays for sent in between)
    assert all(len(sent.stays) < 3 for sent in between)
    scene.kept = (first.attempt,)
    newest = first.attempt.step + copying.COPY_SECONDS - 1
    assert scene.until_sent().step == newest, "a step takes a second, and the one that is under way is not sealed"


def test_copies_that_take_processors_from_training_are_sent_for_a_hundredth_of_its_time() -> None:
    scene = Scene()
    first = scene.snapshot().attempt
    scene.kept, scene.sending_seconds = (first,), 0.3
    assert scene.until_sent().step == first.step + 30 - 1


def test_snapshot_that_is_safe_on_other_nodes_stays_until_the_next_one_is() -> None:
    scene = Scene()
    first = scene.snapshot().attempt
    scene.kept = (first,)
    second = scene.until_sent()
    newest = scene.state.held
    for _ in range(5):  # three slots are taken: nothing is lost for the sake of a snapshot that stays in memory
        assert scene.next_step() == []
    assert set(scene.held) == {first, second, newest}
    scene.kept = (first, second)
    scene.next_step()
    scene.next_step()
    assert set(scene.arm_sent().stays) == {second, newest}


def test_copy_that_no_arena_has_any_more_is_not_waited_for() -> None:
    """All ranks went on from an older one, in a new generation."""
    scene = Scene(policy=replace(AUTO, every_seconds=0.0))
    gone = scene.snapshot().attempt
    assert scene.state.copying == gone
    scene.snapshot()
    scene.held = tuple(one for one in scene.held if one != gone)
    scene.next_step()
    sent = scene.until_sent()
    assert sent.step > gone.step


def test_node_that_was_away_is_told_again_what_to_send() -> None:
    scene = Scene()
    scene.snapshot()
    scene.do(run_state.Disconnected("a"))
    assert "a <- Copy" in scene.hello("a", scene.state.reports["a"])


def came_back(scene: Scene) -> m.Attempt:
    """A rank was lost, and all go on from a snapshot in memory, which is returned; only node b has yet to say so."""
    first = scene.snapshot().attempt
    scene.kept = (first,)
    scene.next_step()
    kept, held = (scene.step - 1, scene.step), (first,)
    gone = m.RankExit(0, 0, 7, 1, 9, scene.step, 3, kept=kept, shard="x")
    left = m.RunningRank(1, 0, 7, scene.step, 3, True, halted=True, live=scene.step, kept=kept, shard="y", looped=True)
    scene.report("a", exits=(gone,), stopped=True, held=held)
    lines = scene.report("b", ranks=(left,), halted=True, held=held)
    assert f"continues at {first.step} from arena, 1 kept, 1 new" in lines
    scene.stored()
    scene.say("a", m.StoreReady(scene.state.number, "10.0.0.1", 29400))
    scene.kept, scene.step = (), first.step
    scene.wait(copying.RETURN_SECONDS)
    assert "a <- Copy" not in scene.steps("a", first.step), "the other one has not come to its loop yet"
    return first


@pytest.mark.parametrize("given", [AUTO, CheckpointPolicy(0, 3600.0, snapshot_steps=2)])
def test_what_all_went_on_from_goes_to_the_keepers_of_the_new_generation_soon(given: CheckpointPolicy) -> None:
    """A node that took the place of a lost one has it from a keeper, and is nobody's copy of it."""
    scene = Scene(policy=given)
    first = came_back(scene)
    scene.steps("b", first.step)
    scene.wait(0.9 * copying.RETURN_SECONDS)
    assert scene.sent == [first], "who has just come back wants the processors"
    scene.wait(0.1 * copying.RETURN_SECONDS)
    assert scene.sent == [first, first]


@pytest.mark.parametrize("asked_for", [False, True])
def test_next_snapshot_is_sent_at_once_after_a_return_only_if_it_was_asked_for(asked_for: bool) -> None:
    given = CheckpointPolicy(0, 3600.0, snapshot_steps=2) if asked_for else AUTO
    scene = Scene(policy=given)
    first = came_back(scene)
    scene.steps("b", first.step)
    back = scene.now
    scene.step_seconds = 0.05
    newest = scene.snapshot().attempt
    assert scene.now < back + copying.RETURN_SECONDS
    assert scene.sent == ([first, newest] if asked_for else [first])
    scene.wait(copying.RETURN_SECONDS)
    assert scene.sent == [first, newest]


def test_copies_that_take_long_stop_no_snapshot_for_longer_than_they_are_worth() -> None:
    scene = Scene()
    scene.kept = (scene.snapshot().attempt,)
    slow = scene.until_sent()
    waited = 0
    while scene.next_step() == []:
        waited += 1
    assert waited < copying.SPARED_SECONDS + 1
    assert slow in scene.arm_sent().stays, "it is still on its way"
    assert scene.sent[-1] == slow


def test_commit_takes_the_slot_of_what_is_only_kept() -> None:
    scene = Scene()
    scene.kept = (scene.snapshot().attempt,)
    scene.until_sent()
    assert scene.next_step() == []
    scene.commit_due()
    assert scene.state.barrier is not None
    assert scene.state.barrier.persist
    assert copying.has_room(scene.state, scene.state.barrier.stays)


def test_snapshots_of_a_given_period_are_sent_as_soon_as_the_last_one_is_there() -> None:
    scene = Scene(policy=CheckpointPolicy(0, 3600.0, snapshot_steps=2), slots=copying.SLOTS + 1)
    assert copying.slots_wanted(scene.state) == scene.slots
    found = []
    for _ in range(8):
        found.append(scene.snapshot())
        scene.kept = (scene.sent[-1],)
    assert [sent.attempt.step for sent in found] == [2, 4, 6, 8, 10, 12, 14, 16], "none waits for a slot"
    assert scene.sent == [sent.attempt for sent in found]


def test_newest_snapshot_is_sent_when_the_one_before_is_there_not_when_another_is_asked_for() -> None:
    scene = Scene(policy=CheckpointPolicy(0, 3600.0, snapshot_steps=2), slots=copying.SLOTS + 1)
    first, second = scene.snapshot().attempt, scene.snapshot().attempt
    assert scene.sent == [first]
    scene.kept = (first,)
    scene.steps("a", scene.step)
    assert scene.sent == [first], "its other half is not there"
    scene.steps("b", scene.step)
    assert scene.sent == [first, second]


def test_without_memory_for_a_third_slot_all_are_copied_and_none_waits() -> None:
    scene = Scene(slots=2)
    for _ in range(8):
        assert scene.next_step() == []
    scene.next_step(3.0)
    assert scene.arm_sent().stays == ()
    found = []
    for _ in range(3):
        while scene.state.barrier is None:
            scene.next_step()
        found.append(scene.snapshot().attempt)
    assert scene.sent == found


def test_what_a_commit_has_is_kept_for_nobody() -> None:
    scene = Scene()
    first = scene.snapshot().attempt
    scene.kept = (first,)
    scene.commit_due()
    scene.snapshot()
    assert first in scene.arm_sent().stays
    assert scene.state.barrier is not None
    assert scene.state.barrier.persist
    scene.committed()
    scene.snapshot()
    scene.next_step()
    assert first not in scene.arm_sent().stays


def write_commit(scene: Scene) -> m.Attempt:
    """A commit is sealed, and not yet written."""
    scene.commit_due()
    while not (sent := scene.snapshot()).persist:
        pass
    assert scene.state.writing is not None
    assert scene.state.writing.attempt == sent.attempt
    return sent.attempt


def prepare(scene: Scene, attempt: m.Attempt) -> None:
    for rank, node in enumerate(scenes.NODES):
        scene.say(node, m.Prepared(attempt, m.PackRecord(rank, f"packs/{rank}", "", "0" * 64, 1, 1, 1)))


def test_snapshots_go_on_while_a_commit_is_written() -> None:
    scene = Scene(peer_port=0)
    attempt = write_commit(scene)
    taken = [scene.snapshot() for _ in range(4)]
    assert [sent.attempt.step - attempt.step for sent in taken] == [1, 2, 3, 4]
    assert all(attempt in sent.stays and not sent.persist for sent in taken)
    assert scene.state.held == taken[-1].attempt
    prepare(scene, attempt)
    scene.do(run_state.Published(attempt, "f" * 64))
    assert "a <- Committed" in " ".join(scene.stored())
    assert scene.state.writing is None
    assert scene.state.newest_commit


def test_commit_goes_to_other_nodes_as_soon_as_the_last_copy_is_there() -> None:
    """What is lost with a node is then not older in memory than in storage."""
    scene = Scene()
    scene.until_sent()
    first = scene.sent[-1]
    commit = write_commit(scene)
    assert scene.sent[-1] == first, "that one is not at its keeper yet"
    prepare(scene, commit)
    scene.do(run_state.Published(commit, "f" * 64))
    scene.stored()
    assert scene.sent[-1] == commit, "now that one is worth nothing any more"
    scene.snapshot()
    assert scene.sent[-1] == commit
    scene.kept = (commit,)
    second = write_commit(scene)
    assert scene.sent[-1] == second
    prepare(scene, second)
    scene.do(run_state.Published(second, "f" * 64))
    scene.stored()
    assert second in copying.stays(scene.state, False, scene.now), "it is as new as the commit, and need not be read"


def test_no_second_commit_while_one_is_written() -> None:
    scene = Scene(peer_port=0)
    write_commit(scene)
    scene.commit_due()
    assert not any(scene.snapshot().persist for _ in range(4))


def test_where_there_are_two_slots_a_commit_that_is_written_leaves_one_for_one_snapshot() -> None:
    scene = Scene(peer_port=0, slots=2)
    attempt = write_commit(scene)
    kept = scene.snapshot().attempt
    for _ in range(4):
        scene.next_step()
    assert scene.state.barrier is None
    assert scene.state.held == kept
    prepare(scene, attempt)
    scene.do(run_state.Published(attempt, "f" * 64))
    scene.stored()
    assert scene.snapshot().attempt.step > kept.step


def test_commit_that_storage_refused_is_owed_and_keeps_no_snapshot_away() -> None:
    policy = replace(AUTO, every_steps=100, every_seconds=0.0)
    scene = Scene(peer_port=0, policy=policy)
    attempt = write_commit(scene)
    assert attempt.step == 100
    scene.say("a", m.AttemptFailed(attempt, 0, "No space left on device"))
    assert scene.state.writing is None
    paused = scene.now + schedule.FAILED_PAUSES_SECONDS[0]
    first = scene.snapshot()
    assert not first.persist
    while scene.now < paused + 1.0 or not (sent := scene.snapshot()).persist:
        scene.next_step()
    assert sent.attempt.step < 110, "not at the next multiple of the period"


def test_snapshot_that_a_node_has_no_slot_for_yet_is_no_failure() -> None:
    scene = Scene(peer_port=0)
    scene.snapshot()
    scene.next_step()
    assert scene.state.barrier is not None
    refused = scene.state.barrier.attempt
    scene.say("a", m.ArmReply(refused, False, -1, "an earlier snapshot is still being written"))
    assert scene.state.cadence.failures == 0
    assert not any("given up" in line for line in scene.told)
    scene.wait(PACE)
    assert scene.snapshot().attempt.number > refused.number


def test_run_goes_on_from_the_snapshot_that_is_newer_than_the_commit_that_is_written() -> None:
    scene = Scene(peer_port=0)
    attempt = write_commit(scene)
    newer = scene.snapshot().attempt
    kept = (newer.step - 1, newer.step)
    gone = m.RankExit(0, 0, 7, 1, 9, newer.step, 3, kept=kept, shard="x")
    left = m.RunningRank(1, 0, 7, newer.step, 3, True, halted=True, live=newer.step, kept=kept, shard="y", looped=True)
    held = tuple(sorted(scene.held))
    scene.report("a", exits=(gone,), stopped=True, held=held)
    lines = scene.report("b", ranks=(left,), halted=True, held=held)
    assert f"continues at {newer.step} from arena, 1 kept, 1 new" in lines
    assert scene.state.writing is not None, "it is waited for by nobody"
    assert scene.state.writing.attempt == attempt


def test_slots_are_asked_for_where_copies_are_sent() -> None:
    assert copying.slots_wanted(Scene().state) == 3
    assert copying.slots_wanted(Scene(peer_port=0).state) == 3, "one is written while others are taken"
    assert copying.slots_wanted(Scene(peer_port=0, policy=replace(AUTO, every_seconds=0.0)).state) == 2
    assert copying.slots_wanted(Scene(policy=replace(AUTO, snapshot_auto=False)).state) == 3
    often = replace(AUTO, snapshot_auto=False, snapshot_seconds=1.0)
    assert copying.slots_wanted(Scene(policy=often).state) == 4
    assert copying.slots_wanted(Scene(policy=often, peer_port=0).state) == 3
    assert copying.slots_wanted(Scene(policy=CheckpointPolicy(10, 0.0)).state) == 2


def spec(key: str, *placements: str) -> TensorSpec:
    mesh = Mesh((2,), (0, 1)) if placements else None
    return TensorSpec(key, "float32", (4,), mesh, placements)


def test_a_box_that_one_rank_holds_is_no_replica() -> None:
    whole, shard, copy = spec("a"), spec("b", "S0"), spec("b", "R")
    assert has_only_replicas([[whole], [whole]])
    assert has_only_replicas([[whole, copy], [whole, copy]])
    assert not has_only_replicas([[whole, shard], [whole, shard]])
    assert not has_only_replicas([[whole], []])
    alone = TensorSpec("p", "float32", (4,), private=True)
    assert has_only_replicas([[whole, alone], [whole, alone]]), "private state has its own way to survive"

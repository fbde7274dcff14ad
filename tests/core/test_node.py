"""The agent's decisions as scripted histories."""

from __future__ import annotations

import msgspec
import pytest

from ftrain.core import local, node
from ftrain.core import messages as m
from ftrain.core.page import Phase
from ftrain.errors import ExitCode

HELLO = m.Hello("a", 0, 2, "10.0.0.1", "a", 1, "run", "job", "1", 0)
ATTEMPT = m.Attempt(1, 10, 1)


class Scene:
    """An agent with two workers, ranks 2 and 3."""

    def __init__(self) -> None:
        self.state = node.State(HELLO, grace_seconds=25.0)
        self.now = 0.0
        self.pages: dict[int, tuple[int, int]] = {}
        self.said: list[m.FromAgent] = []

    def do(self, *events: node.Event) -> list[str]:
        lines = []
        for event in events:
            self.state, actions = node.step(self.state, event, self.now, self.pages)
            lines += [describe(action) for action in actions]
            self.said += [action.message for action in actions if isinstance(action, node.Send)]
        return lines

    def say(self, *messages: m.FromCoordinator) -> list[str]:
        return self.do(*map(node.Said, messages))

    def connected(self, term: int = 1) -> Scene:
        self.do(node.Connected(), node.Said(m.Welcome("run", term, 10.0, 1.0)))
        return self

    def started(self, generation: int = 1) -> Scene:
        if not self.state.connected:
            self.connected()
        self.say(start(generation))
        for rank in (2, 3):
            self.do(node.Forked(rank, 100 + rank), node.WorkerSaid(rank, local.WorkerJoined()))
        return self

    def looping(self, total_steps: int = 0) -> Scene:
        self.started()
        for rank in (2, 3):
            self.pages[rank] = (0, Phase.STEP)
            self.do(node.WorkerSaid(rank, local.WorkerLooping(0, total_steps)))
        return self

    def armed(self) -> Scene:
        self.looping()
        self.say(m.Arm(1, ATTEMPT))
        self.do(node.Armed(ATTEMPT, True, 4))
        return self

    def exited(self, rank: int, signal: int = 9, code: int = 0, step: int = 0, phase: Phase = Phase.STEP) -> list[str]:
        return self.do(node.WorkerExited(m.RankExit(rank, rank - 2, 100 + rank, code, signal, step, int(phase))))

    @property
    def summary(self) -> str:
        assert self.state.leave is not None
        return self.state.leave.summary


def start(generation: int, term: int = 1) -> m.Start:
    return m.Start(term, generation, 1, 2, 2, 4, "b", "10.0.0.2", 29400, 0, 0, None)


def pack(rank: int) -> m.PackRecord:
    return m.PackRecord(rank, f"packs/{rank}", "", "0" * 64, 1, 1, 1)


def describe(action: node.Action) -> str:
    match action:
        case node.Send(m.ArmReply(_, accepted, step, _)):
            return f"say ArmReply {accepted} {step}"
        case node.Send(m.Changed(report)):
            state = "stopped" if report.stopped else "looping" if report.looping else "running"
            return f"say Changed {state} {report.generation}"
        case node.Send(message):
            return f"say {type(message).__name__}"
        case node.Kill(grace_seconds):
            return f"kill {grace_seconds:g}"
        case node.ArmPages(attempt, slot):
            return f"arm {attempt.step} slot {slot}"
        case node.Persist(attempt, rank, slot):
            return f"persist {attempt.step} rank {rank} slot {slot}"
        case node.SetVerdict(_, leave):
            return f"verdict {'leave' if leave else 'go on'}"
        case node.Exit(code, _):
            return f"exit {int(code)}"
    return type(action).__name__


def test_start_forks_once_however_often_it_is_said() -> None:
    scene = Scene().connected()
    assert scene.say(start(1)) == ["Fork"]
    assert scene.say(start(1)) == []


def test_snapshot_is_persisted_and_every_step_of_it_reported() -> None:
    scene = Scene().looping()
    assert scene.say(m.Arm(1, ATTEMPT)) == ["arm 10 slot 0"]
    assert scene.do(node.Armed(ATTEMPT, True, 4)) == ["say ArmReply True 4"]
    costs = {2: m.Cost(0.02, 0.5, 0.01), 3: m.Cost(0.03, 0.5, 0.005)}
    first, last = (node.WorkerSaid(rank, local.WorkerSealed(1, cost)) for rank, cost in costs.items())
    assert scene.do(first) == ["persist 10 rank 2 slot 0"]
    assert scene.do(first) == []
    assert scene.do(last) == ["say Sealed", "persist 10 rank 3 slot 0"]
    assert scene.do(last) == []
    (said,) = [one for one in scene.said if isinstance(one, m.Sealed)]
    most = m.Cost(0.03, 0.5, 0.01)
    assert said == m.Sealed(ATTEMPT, (2, 3), most), "all ranks in one message, with the most that it cost any"
    assert scene.do(node.Persisted(ATTEMPT, pack(2))) == ["say Prepared"]


def test_heartbeat_says_again_what_the_attempt_has_come_to() -> None:
    scene = Scene().armed()
    scene.do(node.WorkerSaid(2, local.WorkerSealed(1, m.Cost(0.01))), node.Persisted(ATTEMPT, pack(2)))
    assert scene.do(node.Beat()) == ["say Heartbeat", "say ArmReply True -1", "say Prepared"]
    scene.do(node.WorkerSaid(3, local.WorkerSealed(1, m.Cost(0.01))))
    assert scene.do(node.Beat()) == ["say Heartbeat", "say ArmReply True -1", "say Sealed", "say Prepared"]


def test_heartbeat_says_again_that_the_attempt_failed_here() -> None:
    scene = Scene().armed()
    scene.do(node.WorkerSaid(2, local.WorkerSealed(1, m.Cost(0.01))))
    assert scene.do(node.PersistFailed(ATTEMPT, 2, "disk full")) == ["say AttemptFailed"]
    assert scene.do(node.Beat())[-1] == "say AttemptFailed"


def test_step_that_a_rank_has_passed_is_refused_and_so_is_the_repeated_question() -> None:
    scene = Scene().looping()
    scene.say(m.Arm(1, ATTEMPT))
    assert scene.do(node.Armed(ATTEMPT, False, 11, frozenset())) == ["say ArmReply False 11"]
    assert scene.say(m.Arm(1, ATTEMPT)) == ["say ArmReply False -1"]


def test_worker_that_is_not_in_its_loop_refuses_the_snapshot() -> None:
    scene = Scene().started()
    assert scene.say(m.Arm(1, ATTEMPT)) == ["say ArmReply False -1"]


def test_slot_that_is_being_written_is_not_given_out_again() -> None:
    scene = Scene().armed()
    scene.do(node.WorkerSaid(2, local.WorkerSealed(1, m.Cost(0.01))))
    assert scene.say(m.Abort(1, ATTEMPT, "rank 3 died")) == ["DisarmPages", "CancelPersist"]
    assert scene.say(m.Arm(1, m.Attempt(1, 20, 2))) == ["arm 20 slot 1"]


def test_older_coordinator_is_not_obeyed() -> None:
    scene = Scene().looping()
    scene.say(m.Welcome("run", 7, 10.0, 1.0))
    before = scene.state
    assert scene.say(m.Stop(1, 1, "stale", 3.0), m.Arm(6, ATTEMPT), start(2, term=6), m.Leave(6, 0, "")) == []
    assert scene.state == before
    assert scene.say(m.Welcome("run", 6, 10.0, 1.0)) == ["Reconnect"]


def test_older_generation_is_neither_stopped_nor_armed() -> None:
    scene = Scene().looping()
    for rank in (2, 3):
        scene.exited(rank)
    scene.started(generation=2)
    assert scene.say(m.Stop(1, 1, "old", 3.0), m.Arm(1, ATTEMPT), m.Verdict(1, ATTEMPT, True)) == []


def test_stop_ends_the_workers_and_is_reported_when_they_are_gone() -> None:
    scene = Scene().looping()
    assert scene.say(m.Stop(1, 1, "a rank died", 3.0)) == ["kill 3", "say Changed looping 1"]
    assert scene.exited(2) == ["say Changed looping 1"]
    assert scene.exited(3) == ["say Changed stopped 1"]
    assert not any(exit.failed for exit in node.report(scene.state, {}).exits)


def test_stop_of_a_generation_that_never_came_here_is_remembered() -> None:
    scene = Scene().connected()
    assert scene.say(m.Stop(1, 5, "too late", 3.0)) == ["say Changed stopped 5"]
    assert scene.say(start(5)) == []
    assert scene.say(start(6)) == ["Fork"]


def test_stop_of_a_later_generation_ends_the_workers_of_the_present_one_first() -> None:
    scene = Scene().looping()
    assert scene.say(m.Stop(1, 2, "leaving", 3.0)) == ["kill 3", "say Changed looping 2"]
    assert scene.exited(2) == ["say Changed looping 2"]
    assert scene.exited(3) == ["say Changed stopped 2"]


@pytest.mark.parametrize("order", [m.Halt(1, 1, "a rank died"), m.Stop(1, 1, "a rank died", 3.0)], ids=["halt", "stop"])
def test_order_that_is_said_again_is_not_answered_again(order: m.FromCoordinator) -> None:
    """The coordinator says it again with each report of a node that is not done with it: they talked without pause."""
    scene = Scene().looping()
    assert [line for line in scene.say(order) if line.startswith("say")] == ["say Changed looping 1"]
    assert [line for line in scene.say(order, order) if line.startswith("say")] == []


def test_commit_of_the_last_step_releases_workers_at_their_end() -> None:
    scene = Scene().looping(total_steps=10)
    for rank in (2, 3):
        scene.do(node.WorkerSaid(rank, local.WorkerAtEnd(10)))
    scene.say(m.Arm(1, ATTEMPT))
    scene.do(node.Armed(ATTEMPT, True, 10))
    assert scene.say(m.Committed(1, ATTEMPT)) == ["ReleasePages"]


def test_commit_of_an_older_step_does_not_release_workers_at_their_end() -> None:
    scene = Scene().looping(total_steps=12)
    scene.say(m.Arm(1, ATTEMPT))
    scene.do(node.Armed(ATTEMPT, True, 10))
    for rank in (2, 3):
        scene.do(node.WorkerSaid(rank, local.WorkerAtEnd(12)))
    assert scene.say(m.Committed(1, ATTEMPT)) == []


def test_declined_agent_leaves_no_worker_behind() -> None:
    scene = Scene().looping()
    assert scene.say(m.Declined("the run is over", 69)) == ["kill 0"]
    scene.exited(2)
    assert scene.exited(3)[-2:] == ["say Goodbye", "exit 69"]


def test_first_signal_is_passed_on_and_the_second_ends_at_once() -> None:
    scene = Scene().looping()
    assert scene.do(node.Signalled("SIGTERM")) == ["Show", "say Notice"]
    assert scene.do(node.Signalled("SIGTERM")) == []  # the same one, sent to the whole group
    scene.now += 5.0
    assert scene.do(node.Signalled("SIGTERM")) == ["kill 0"]
    scene.exited(2, step=1)
    assert scene.exited(3)[-1] == f"exit {int(ExitCode.PREEMPTED_UNSAVED)}"


@pytest.mark.parametrize(("step", "code"), [(10, 75), (11, 76)])
def test_node_that_leaves_alone_lost_only_what_it_finished_after_the_commit(step: int, code: int) -> None:
    scene = Scene().looping()
    scene.say(m.Committed(1, ATTEMPT))
    scene.do(node.Disconnected(), node.Signalled("SIGTERM"))
    # Until it is dead a worker goes on.
    scene.exited(2, step=10)
    assert scene.exited(3, step=step)[-1] == f"exit {code}"
    assert scene.summary == "stopped at once on SIGTERM; the last commit stands"


@pytest.mark.parametrize(("joins", "code"), [(True, 75), (False, 76)])
def test_node_that_leaves_before_its_script_has_joined_lost_nothing_if_it_is_one_that_does(
    joins: bool, code: int
) -> None:
    scene = Scene()
    scene.state = node.State(msgspec.structs.replace(HELLO, joins=joins))
    scene.connected().say(start(1))
    for rank in (2, 3):
        scene.do(node.Forked(rank, 100 + rank))
    scene.do(node.Disconnected(), node.Signalled("SIGTERM"))
    scene.exited(2, step=-1, phase=Phase.BOOT)
    assert scene.exited(3, step=-1, phase=Phase.BOOT)[-1] == f"exit {code}"
    assert scene.summary == "stopped at once on SIGTERM"  # of a commit it has not heard


def test_notice_is_given_again_to_the_next_coordinator() -> None:
    scene = Scene().looping()
    scene.do(node.Signalled("SIGTERM"), node.Disconnected(), node.Connected())
    assert scene.say(m.Welcome("run", 9, 10.0, 1.0)) == ["say Notice"]


def test_training_goes_on_without_a_coordinator_but_not_for_ever() -> None:
    scene = Scene().looping()
    scene.do(node.Disconnected())
    scene.now = 599.0
    assert scene.do(node.Beat()) == []
    scene.now = 600.0
    assert scene.do(node.Beat()) == ["kill 0"]
    assert scene.summary == "no coordinator answered for 600 s"


def test_exception_of_a_worker_is_its_own_even_when_it_was_told_to_stop() -> None:
    scene = Scene().looping()
    error = m.ErrorReport("ValueError", "bad", "Traceback", "train.py:3", 5.0)
    scene.do(node.WorkerSaid(2, local.WorkerError(error)), node.Said(m.Stop(1, 1, "a rank died", 3.0)))
    scene.exited(2, signal=0, code=1)
    scene.exited(3)
    own, told = node.report(scene.state, {}).exits
    assert (own.failed, own.error) == (True, error)
    assert told.ordered

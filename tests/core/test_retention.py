"""Which commits stay."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.core import journal, metrics, recovery
from ftrain.core import messages as m
from ftrain.core.journal import CommitBody, History, Record, RetireBody
from ftrain.core.retention import Best, RetentionPolicy, to_retire
from ftrain.core.run_state import Turn
from tests.core.scene import Scene, successor

Logs = dict[str, tuple[int, float | str]]


class Run:
    """A journal that grows by commits, and by what the policy retires after each."""

    def __init__(self, policy: RetentionPolicy) -> None:
        self.policy = policy
        self.history = History()
        self.made: list[CommitBody] = []
        self.times: list[float] = []

    def commit(self, step: int, unix_seconds: float = 0.0, logs: Logs | None = None) -> None:
        logged = {name: m.Logged(at, value) for name, (at, value) in (logs or {}).items()}
        body = CommitBody(m.Attempt(1, step, len(self.made) + 1), 1, "0" * 64, 8, metrics=logged)
        self.made.append(body)
        self.times.append(unix_seconds)
        self._append(body, unix_seconds)
        for attempt in to_retire(self.history, self.policy, frozenset()):
            self._append(RetireBody(attempt), unix_seconds)

    def _append(self, body: journal.Body, unix_seconds: float) -> None:
        head = self.history.head
        record = Record(head.sequence + 1, head.digest, "n", unix_seconds, body)
        data = journal.encode(record)
        assert journal.decode(data, "there") == record
        self.history = self.history.after(record, journal.digest(data))

    @property
    def kept(self) -> list[int]:
        return [commit.attempt.step for _, commit in self.history.commits]


def test_last_only_keeps_the_newest() -> None:
    run = Run(RetentionPolicy(2))
    for step in (10, 20, 30):
        run.commit(step)
    assert run.kept == [20, 30]


def test_every_so_many_steps_keeps_the_first_commit_past_each_multiple() -> None:
    run = Run(RetentionPolicy(1, every_steps=100))
    for step in (40, 90, 110, 150, 200, 290, 420, 430):
        run.commit(step)
    assert run.kept == [110, 200, 420, 430]


def test_every_so_many_seconds_keeps_commits_that_far_apart() -> None:
    run = Run(RetentionPolicy(1, every_seconds=100.0))
    for number, seconds in enumerate((0.0, 50.0, 99.0, 100.0, 180.0, 230.0, 240.0)):
        run.commit(number + 1, seconds)
    assert run.kept == [1, 4, 6, 7]


def test_clock_that_was_set_back_goes_on_keeping_commits() -> None:
    run = Run(RetentionPolicy(1, every_seconds=100.0))
    for number, seconds in enumerate((1000.0, 10.0, 60.0, 120.0)):
        run.commit(number + 1, seconds)
    assert run.kept == [1, 2, 4]


@pytest.mark.parametrize("largest", [False, True])
def test_best_keeps_the_best_values_and_never_nan(largest: bool) -> None:
    run = Run(RetentionPolicy(1, best=(Best(2, "loss", largest),)))
    for step, value in enumerate((3.0, 1.0, "nan", 2.0, 5.0, 4.0), start=1):
        run.commit(step, logs={"loss": (step - 1, value)})
    run.commit(7)
    assert run.kept == ([5, 6, 7] if largest else [2, 4, 7])


def test_commits_after_one_evaluation_count_once_for_it() -> None:
    run = Run(RetentionPolicy(1, best=(Best(2, "accuracy", largest=True),)))
    run.commit(10, logs={"accuracy": (9, 0.5)})
    run.commit(20, logs={"accuracy": (19, 0.9)})
    for step in (21, 22, 23):
        run.commit(step, logs={"accuracy": (19, 0.9)})
    assert run.kept == [10, 20, 23]


def test_damaged_commit_is_kept_aside_and_does_not_count() -> None:
    run = Run(RetentionPolicy(3))
    for step in (1, 2, 3):
        run.commit(step)
    suspects = frozenset({run.made[2].attempt})
    assert to_retire(run.history, RetentionPolicy(1), suspects) == (run.made[0].attempt,)
    assert to_retire(run.history, RetentionPolicy(2), suspects) == ()


_VALUES = st.one_of(st.sampled_from(["nan", "inf", "-inf"]), st.integers(-3, 3).map(float))
_COMMITS = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 90).map(float), st.one_of(st.none(), _VALUES)), min_size=1, max_size=24
)
_POLICIES = st.builds(
    RetentionPolicy,
    st.integers(1, 3),
    st.sampled_from([0, 1, 5, 10]),
    st.sampled_from([0.0, 60.0, 200.0]),
    st.lists(st.builds(Best, st.integers(1, 3), st.just("loss"), st.booleans()), max_size=2).map(tuple),
)


@settings(deadline=None)
@given(_COMMITS, _POLICIES)
def test_deciding_after_each_commit_keeps_what_deciding_at_the_end_would(
    commits: list[tuple[int, float, float | str | None]], policy: RetentionPolicy
) -> None:
    """So that no rule depends on when it was asked, on restarts, or on what other rules kept meanwhile."""
    run, everything = Run(policy), Run(RetentionPolicy(len(commits)))
    step, seconds = 0, 0.0
    for more_steps, more_seconds, value in commits:
        step, seconds = step + more_steps, seconds + more_seconds
        logs: Logs = {} if value is None else {"loss": (step - 1, value)}
        run.commit(step, seconds, logs if step else {})
        everything.commit(step, seconds, logs if step else {})
    retired = to_retire(everything.history, policy, frozenset())
    assert [one.attempt for one in run.made if one.attempt not in retired] == [
        commit.attempt for _, commit in run.history.commits
    ]


def test_commit_carries_what_was_logged_up_to_its_step_and_not_later() -> None:
    scene = Scene().running()
    barrier = scene.state.barrier
    assert barrier is not None
    step = barrier.attempt.step
    scene.say("a", m.Metrics(1, step - 1, {"loss": 0.5, "lr": 1.0}))
    scene.say("a", m.Metrics(1, step, {"loss": 0.25}))
    scene.say("a", m.Metrics(9, step - 1, {"loss": 7.0}))  # of a generation that is not
    scene.committed()
    _, body = scene.state.history.commits[-1]
    assert body.metrics == {"loss": m.Logged(step - 1, 0.5), "lr": m.Logged(step - 1, 1.0)}
    assert successor(scene).state.logged == body.metrics
    scene.say("a", m.Metrics(1, step + 1, {"lr": 2.0}))
    scene.steps("a", step)
    scene.steps("b", step)
    scene.committed()
    _, body = scene.state.history.commits[-1]
    assert body.metrics == {"loss": m.Logged(step, 0.25), "lr": m.Logged(step + 1, 2.0)}


def test_what_was_logged_in_steps_that_are_done_again_is_void() -> None:
    scene = Scene().running()
    step = 10
    scene.say("a", m.Metrics(1, step - 1, {"loss": 0.5}))
    scene.committed()
    scene.say("a", m.Metrics(1, step + 2, {"loss": 0.1, "late": 1.0}))
    turn = Turn(scene.state, scene.now, scene.now)
    metrics.go_back(turn, step, recovery.recovery_line(scene.state.history, frozenset()))
    assert turn.state.logged == {"loss": m.Logged(step - 1, 0.5)}
    metrics.go_back(turn, 0, None)
    assert turn.state.logged == {}


def test_commit_is_let_go_when_the_last_that_refers_to_it_is_retired() -> None:
    run = Run(RetentionPolicy(9))
    for step in (1, 2, 3):
        run.commit(step)
    first, second, third = (one.attempt for one in run.made)
    history = History()
    bodies: list[journal.Body] = [
        CommitBody(first, 1, "0" * 64, 8),
        CommitBody(second, 1, "0" * 64, 8, refers=(first,)),
        CommitBody(third, 1, "0" * 64, 8, refers=(first, second)),
        RetireBody(first),
        RetireBody(second),
        RetireBody(third),
    ]
    told = []
    for body in bodies:
        record = Record(history.head.sequence + 1, history.head.digest, "n", 0.0, body)
        history = history.after(record, journal.digest(journal.encode(record)))
        told.append((history.let_go, set(history.needed)))
    everything = {first, second, third}
    assert told[2:] == [
        ((), everything),
        ((), everything),
        ((), everything),
        ((first, second, third), set()),
    ]


def test_attempt_may_refer_to_the_newest_commit_and_what_that_refers_to() -> None:
    scene = Scene().running()
    assert scene.arm_sent().base is None
    first = scene.committed()
    scene.steps("a", 12)
    scene.steps("b", 12)
    assert scene.arm_sent().base == first
    second = scene.committed(refers={0: (first,)})
    assert scene.state.history.commits[-1][1].refers == (first,)
    scene.stored()  # the first is retired, and stays
    assert scene.state.history.lingering == {first}
    assert not [line for line in scene.log if line.startswith("discard")]
    scene.steps("a", 22)
    scene.steps("b", 22)
    assert scene.arm_sent().base == second
    scene.committed(refers={1: (second,)})
    scene.stored()
    assert f"discard {first.step}.{first.number}" in scene.log
    assert f"discard {second.step}.{second.number}" not in scene.log


def test_pack_that_refers_to_what_may_go_is_not_taken() -> None:
    scene = Scene().running()
    scene.committed()
    scene.steps("a", 12)
    scene.steps("b", 12)
    stranger = m.Attempt(1, 5, 77)
    scene.prepared(refers={0: (stranger,)})
    assert any("its pack refers to what the newest commit does not have" in line for line in scene.told)
    assert len(scene.state.history.commits) == 1

"""What failures mean: docs/operation.md, "When the run gives up"."""

from __future__ import annotations

import pytest

from ftrain.core import supervision
from ftrain.core.messages import ErrorReport, RankExit
from ftrain.core.supervision import Budget, Failure, FailureClass, GiveUp, Restart, RestartPolicy

POLICY = RestartPolicy()
KILLED = Failure(FailureClass.SIGNAL, "a", "rank 0 was killed by SIGKILL after step 3", 0, 3)
RAISED = Failure(
    FailureClass.EXCEPTION, "a", "rank 1 raised ValueError", 1, 3, "Traceback", "ValueError|train.py:7|bad|3"
)


def raised(rank: int, message: str, at: float, kind: str = "ValueError", ordered: bool = False) -> RankExit:
    error = ErrorReport(kind, message, f"Traceback\n{kind}: {message}", "train.py:7", at)
    return RankExit(rank, rank, 100 + rank, 1, step=3, error=error, unix_seconds=at, ordered=ordered)


def test_failures_between_commits_never_use_the_budget_up() -> None:
    budget = Budget()
    for _ in range(1000):
        budget, verdict = supervision.judge(POLICY, budget, KILLED, progressed=True, passed=True)
        assert verdict == Restart(0.0)
    assert budget.restarts == 1000


def test_failures_without_progress_pause_longer_and_then_give_up() -> None:
    budget, delays = Budget(), []
    for _ in range(3):
        budget, verdict = supervision.judge(POLICY, budget, KILLED, progressed=False, passed=False)
        assert isinstance(verdict, Restart)
        delays.append(verdict.delay_seconds)
    assert delays == [0.0, 1.0, 4.0]
    assert supervision.judge(POLICY, budget, KILLED, progressed=False, passed=False)[1] == GiveUp(
        "3 restarts in a row without a new commit"
    )


def test_same_error_twice_without_a_commit_gives_up_at_once() -> None:
    budget, verdict = supervision.judge(POLICY, Budget(), RAISED, progressed=False, passed=False)
    assert verdict == Restart(0.0)
    _, verdict = supervision.judge(POLICY, budget, RAISED, progressed=False, passed=False)
    assert verdict == GiveUp("the same error came back at step 3 and nothing was committed in between")


def test_same_error_with_a_commit_between_is_tried_again() -> None:
    budget, _ = supervision.judge(POLICY, Budget(), RAISED, progressed=False, passed=False)
    assert isinstance(supervision.judge(POLICY, budget, RAISED, progressed=True, passed=True)[1], Restart)


def test_same_error_is_the_same_although_the_run_goes_on_from_a_later_state_before_it() -> None:
    budget, _ = supervision.judge(POLICY, Budget(), RAISED, progressed=False, passed=False)
    _, verdict = supervision.judge(POLICY, budget, RAISED, progressed=True, passed=False)
    assert verdict == GiveUp("the same error came back at step 3 and nothing was committed in between")


@pytest.mark.parametrize("kind", [FailureClass.NODE, FailureClass.CORRUPT])
def test_lost_node_or_damaged_checkpoint_uses_no_budget(kind: FailureClass) -> None:
    budget = Budget(restarts=9, without_progress=3)
    budget, verdict = supervision.judge(
        RestartPolicy(max_restarts=0), budget, Failure(kind, "a", "gone"), progressed=False, passed=False
    )
    assert verdict == Restart(0.0)
    assert budget.without_progress == 3


def test_limit_of_the_user_counts_even_with_progress() -> None:
    policy = RestartPolicy(max_restarts=1)
    budget, verdict = supervision.judge(policy, Budget(), KILLED, progressed=True, passed=True)
    assert isinstance(verdict, Restart)
    assert isinstance(supervision.judge(policy, budget, KILLED, progressed=True, passed=True)[1], GiveUp)


def test_echo_of_a_lost_peer_is_not_the_first_failure() -> None:
    echo = raised(1, "Connection closed by peer", at=10.0, kind="RuntimeError")
    cause = raised(2, "bad loss", at=11.0)
    first = supervision.first_failure((("a", echo), ("b", cause)))
    assert (first.rank, first.node, first.summary) == (2, "b", "rank 2 raised ValueError: bad loss after step 3")
    assert supervision.first_failure((("a", echo),)).rank == 1


def test_earliest_of_several_failures_is_the_first() -> None:
    exits = (("a", raised(0, "later", at=12.0)), ("b", raised(3, "sooner", at=11.0)))
    assert supervision.first_failure(exits).rank == 3


def test_worker_that_was_told_to_end_did_not_fail() -> None:
    told = RankExit(0, 0, 100, 0, signal=9, ordered=True)
    assert not told.failed
    with pytest.raises(AssertionError):
        supervision.first_failure((("a", told),))


@pytest.mark.parametrize(
    ("exit", "summary", "kind"),
    [
        (RankExit(2, 0, 9, 0, signal=11, step=7), "rank 2 was killed by SIGSEGV after step 7", FailureClass.SIGNAL),
        (RankExit(2, 0, 9, 0, signal=50), "rank 2 was killed by signal 50", FailureClass.SIGNAL),
        (RankExit(2, 0, 9, 3), "rank 2 exited with code 3", FailureClass.EXIT_CODE),
        (
            raised(2, "chunk 4 of layer.weight", 1.0, "ftrain.errors.CorruptCheckpoint"),
            "rank 2 raised ftrain.errors.CorruptCheckpoint: chunk 4 of layer.weight after step 3",
            FailureClass.CORRUPT,
        ),
    ],
)
def test_exit_is_explained_in_one_line(exit: RankExit, summary: str, kind: FailureClass) -> None:
    failure = supervision.explain("a", exit)
    assert (failure.summary, failure.kind) == (summary, kind)

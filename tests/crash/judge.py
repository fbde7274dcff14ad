"""What must hold after any crash: the old or the new checkpoint, whole, never a mixture, and the run can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ftrain.core.messages import Attempt
from ftrain.errors import FtrainError
from ftrain.storage.base import Storage
from tests.crash.life import Life, Prove, Stopped, Told, restored

STEPS = 10  # from one commit to the next


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What had been promised when it happened."""

    acked: frozenset[Attempt] = frozenset()  # committed, and somebody was told, or acted upon it
    submitted: frozenset[Attempt] = frozenset()  # may be committed
    retiring: frozenset[Attempt] = frozenset()  # may be gone

    def after(self, told: Iterable[Told]) -> Expected:
        """With more that was said."""
        acked, submitted, retiring = set(self.acked), set(self.submitted), set(self.retiring)
        for one in told:
            if one.attempt is not None:
                {"acked": acked, "seen": acked, "submitted": submitted, "retiring": retiring}[one.what].add(one.attempt)
        return Expected(frozenset(acked), frozenset(submitted), frozenset(retiring))


def judge(
    open_storage: Callable[[], Storage],
    expected: Expected,
    writer: str,
    prove: Prove = restored,
    is_known: Callable[[], bool] = lambda: False,
) -> None:
    """Start the run anew on what is there. `prove` may remember what it has proved. Raises `Violation`.

    `is_known` says whether the run has gone on from just this before, after another coordinator took it over.
    """
    try:
        life = Life(open_storage, writer)
        life.begin()
        check_history(life, open_storage(), expected, prove)
        step = life.restore(prove)
        newest = max((body.attempt.step for _, body in life.history.commits), default=0)
        if step != newest:
            raise Violation(f"step {step} was restored, but {newest} is committed")
        if is_known():
            return
        if not life.commit(step + STEPS) or life.restore(prove) != step + STEPS:
            raise Violation(f"the run cannot go on: step {step + STEPS} could not be committed")
        more = Expected(frozenset(body.attempt for _, body in life.history.commits))
        again = Life(open_storage, f"{writer}+")
        again.read()
        check_history(again, open_storage(), more, prove)
    except (FtrainError, Stopped, OSError) as error:
        raise Violation(f"the run cannot go on: {type(error).__name__}: {error}") from error


def check_history(life: Life, storage: Storage, expected: Expected, prove: Prove) -> None:
    """Each commit that the journal names is whole and one that was asked for; none that was promised is missing."""
    commits = {body.attempt: body for _, body in life.history.commits}
    lost = expected.acked - expected.retiring - commits.keys()
    if lost:
        raise Violation(f"the commit of {min(lost)} is lost")
    for attempt, body in commits.items():
        if attempt not in expected.acked | expected.submitted:
            raise Violation(f"{attempt} is committed, but nobody asked for that")
        try:
            prove(storage, attempt, body.manifest_sha256)
        except (FtrainError, AssertionError) as error:
            raise Violation(f"{attempt} is committed, but it is not whole: {error}") from error

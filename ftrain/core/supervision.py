"""What a failure means: its class, whether the run starts again, and when that would be pointless.

The intuition: as long as commits advance, failures are the weather, and the run goes on without limit. A failure that
comes back before anything new was committed uses up a small budget, with growing pauses. The same exception at the
same step with no commit in between is the user's own bug: trying a third time only hides it, so the run gives up at
once and shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from ftrain.core.hangs import waited_for
from ftrain.core.messages import RankExit
from ftrain.errors import ExitCode

SIGNAL_NAMES = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    4: "SIGILL",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    11: "SIGSEGV",
    13: "SIGPIPE",
    14: "SIGALRM",
    15: "SIGTERM",
}
# What a rank raises because *another* rank is gone. Never the first cause when there is any other.
ECHOES = (
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket Timeout",
    "socket has been closed",
    "Timed out waiting",
    "PeerLost",
    "Unrecoverable",
)


class FailureClass(Enum):
    SIGNAL = "signal"
    EXCEPTION = "exception"
    EXIT_CODE = "exit code"
    CORRUPT = "corrupt checkpoint"
    USAGE = "wrong use"
    NODE = "node lost"
    LINK = "link cut"
    HANG = "rank hung"
    LAUNCH = "could not start"


@dataclass(frozen=True, slots=True)
class Failure:
    """One interruption, explained: the first failing rank or node, and how."""

    kind: FailureClass
    node: str
    summary: str  # one line
    rank: int = -1
    step: int = -1
    traceback: str = ""
    signature: str = ""  # equal for the same error; "" where equality says nothing
    unrecoverable: bool = False  # a rank says that it cannot be brought round

    @property
    def is_of_the_script(self) -> bool:
        """Rather than of a machine, or of somebody who kills: what runs into it once, alone, does so again."""
        return self.unrecoverable or (
            self.kind in (FailureClass.EXCEPTION, FailureClass.EXIT_CODE) and bool(self.signature)
        )


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When to give up. `max_restarts` is the user's own limit over the whole launch; None leaves it to progress."""

    max_restarts: int | None = None
    without_progress_max: int = 3
    backoff_seconds: tuple[float, ...] = (0.0, 1.0, 4.0, 10.0, 30.0)
    progress_seconds: float = 600.0  # a script that never joined made progress when it ran this long


@dataclass(frozen=True, slots=True)
class Budget:
    """What has been used up since the last progress."""

    restarts: int = 0
    without_progress: int = 0
    signature: str = ""  # of the last failure, until the run has got past it
    step: int = -1  # of the last failure


@dataclass(frozen=True, slots=True)
class Restart:
    delay_seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    why: str


def judge(
    policy: RestartPolicy, budget: Budget, failure: Failure, progressed: bool, passed: bool
) -> tuple[Budget, Restart | GiveUp]:
    """Decide what follows a failure.

    `progressed`: the run goes on from a later state than after the failure before this one. `passed`: something was
    committed since that one, or a state is left of a later step than it struck at.
    """
    if progressed:
        budget = replace(budget, without_progress=0)
    if passed:
        budget = replace(budget, signature="")
    if failure.kind in (FailureClass.NODE, FailureClass.CORRUPT):
        # A lost machine says nothing about the job, and each damaged checkpoint is passed over only once.
        return replace(budget, restarts=budget.restarts + 1), Restart(0.0)
    if failure.kind is FailureClass.USAGE:
        return budget, GiveUp("the script asks ftrain for something that cannot be")
    if policy.max_restarts is not None:
        if budget.restarts >= policy.max_restarts:
            return budget, GiveUp(f"{policy.max_restarts} restarts (--max-restarts) are used up")
    elif failure.signature and failure.signature == budget.signature:
        at = f" at step {failure.step}" if failure.step >= 0 else ""
        return budget, GiveUp(f"the same error came back{at} and nothing was committed in between")
    elif budget.without_progress >= policy.without_progress_max:
        return budget, GiveUp(f"{policy.without_progress_max} restarts in a row without a new commit")
    delay = policy.backoff_seconds[min(budget.without_progress, len(policy.backoff_seconds) - 1)]
    used = Budget(budget.restarts + 1, budget.without_progress + 1, failure.signature, failure.step)
    return used, Restart(delay)


def first_failure(exits: tuple[tuple[str, RankExit], ...]) -> Failure:
    """Of all ranks (with their nodes) that failed in one generation, explain the one that failed first.

    A rank that reports a lost peer is an echo of another's failure: it is the cause only when there is no other.
    """
    failed = [item for item in exits if item[1].failed]
    assert failed, "asked for the first failure of a generation in which nothing failed"
    node, first = min(failed, key=lambda item: (is_echo(item[1]), item[1].unix_seconds, item[1].rank))
    return explain(node, first)


def explain(node: str, exit: RankExit) -> Failure:
    at = f" after step {exit.step}" if exit.step >= 0 else ""
    who = f"rank {exit.rank}"
    if exit.hang is not None:
        waited = f", while {waited_for(exit.hang.waiting)}" if exit.hang.waiting else ""
        summary = f"{who} hung: {exit.hang.text}{waited}"
        return Failure(FailureClass.HANG, node, summary, exit.rank, exit.step, exit.hang.stack)
    error = exit.error
    if error is not None:
        kind = FailureClass.EXCEPTION
        if error.type.endswith("CorruptCheckpoint"):
            kind = FailureClass.CORRUPT
        elif error.type.startswith("ftrain.errors.") and exit.code == ExitCode.USAGE:
            kind = FailureClass.USAGE
        headline = error.message.strip().splitlines()[0] if error.message.strip() else ""
        summary = f"{who} raised {error.type}{': ' + headline if headline else ''}{at}"
        signature = "" if is_echo(exit) else f"{error.type}|{error.where}|{headline}|{exit.step}"
        unrecoverable = error.type.endswith("Unrecoverable")
        return Failure(kind, node, summary, exit.rank, exit.step, error.traceback, signature, unrecoverable)
    if exit.signal:
        name = SIGNAL_NAMES.get(exit.signal, f"signal {exit.signal}")
        return Failure(FailureClass.SIGNAL, node, f"{who} was killed by {name}{at}", exit.rank, exit.step)
    signature = f"exit {exit.code}|{exit.step}"
    return Failure(
        FailureClass.EXIT_CODE, node, f"{who} exited with code {exit.code}{at}", exit.rank, exit.step, "", signature
    )


def is_echo(exit: RankExit) -> bool:
    if exit.error is None:
        return False
    return sounds_like_a_lost_peer(f"{exit.error.type}: {exit.error.message}")


def sounds_like_a_lost_peer(text: str) -> bool:
    """`text` is an exception's type and message."""
    return any(mark in text for mark in ECHOES)

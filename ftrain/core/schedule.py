"""When the next checkpoint is due, and at which step.

A step can only be armed before any rank has reached it. With a period in steps the step is known long ahead; with a
period in seconds it is guessed a little ahead of the furthest rank, and further ahead each time the guess came too
late.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

LOOKAHEAD_MAX = 1 << 16
FAILED_PAUSES_SECONDS = (1.0, 5.0, 20.0, 60.0)


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """Every so many steps or every so many seconds (exactly one is non-zero), keeping the newest `keep` commits."""

    every_steps: int = 0
    every_seconds: float = 60.0
    keep: int = 2
    attempt_seconds: float = 1800.0  # after which an attempt that does not end is given up

    @property
    def off(self) -> bool:
        return not self.every_steps and not self.every_seconds


@dataclass(frozen=True, slots=True)
class Cadence:
    """What the schedule remembers within one generation."""

    due: float = 0.0  # when the next periodic one is
    retry_at: float = 0.0  # no proposal of any kind before: the last one failed
    beyond: int = 0  # the next step must be greater
    lookahead: int = 2
    failures: int = 0  # failed attempts in a row
    last_tries: int = 0  # those of the run's last step
    cause: str = ""  # why the newest of them failed


def next_step(policy: CheckpointPolicy, cadence: Cadence, furthest: int, total: int) -> int | None:
    """The step to propose now, or None when the run holds none. `furthest`: steps that the front rank finished."""
    if policy.every_steps:
        base = max(furthest, cadence.beyond)
        step = (base // policy.every_steps + 1) * policy.every_steps
        while step < base + cadence.lookahead - 1:
            step += policy.every_steps
    else:
        step = max(furthest + cadence.lookahead, cadence.beyond + 1)
    if total and step >= total:
        step = total  # the last state is always worth a commit
    return step if step > furthest else None


def after_refusal(cadence: Cadence, furthest: int) -> Cadence:
    lookahead = min(cadence.lookahead * 2, LOOKAHEAD_MAX)
    return replace(cadence, beyond=max(cadence.beyond, furthest), lookahead=lookahead)


def after_failure(cadence: Cadence, now: float, cause: str, last: bool = False) -> Cadence:
    """`last`: it was to save the run's last step. These are paused for as if nothing had failed before."""
    before = cadence.last_tries if last else cadence.failures
    pause = FAILED_PAUSES_SECONDS[min(before, len(FAILED_PAUSES_SECONDS) - 1)]
    return replace(
        cadence,
        failures=cadence.failures + 1,
        last_tries=cadence.last_tries + last,
        cause=cause,
        retry_at=now + pause,
    )


def after_commit(policy: CheckpointPolicy, cadence: Cadence, step: int, now: float) -> Cadence:
    return replace(cadence, beyond=step, failures=0, due=now + policy.every_seconds)

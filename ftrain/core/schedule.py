"""When the next snapshot is due, at which step, and whether it is to be committed or only kept in memory.

A step can only be armed before any rank has reached it. With a period in steps the step is known long ahead; with a
period in seconds it is guessed a little ahead of the furthest rank: twice as far each time the guess came too late
although it was known where that is, less far again with each snapshot that was taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ftrain.core.messages import Cost
from ftrain.core.retention import RetentionPolicy

LOOKAHEAD, LOOKAHEAD_MAX = 2, 1 << 16  # steps
LOOKAHEAD_LESS = 8  # one of so many parts
FAILED_PAUSES_SECONDS = (1.0, 5.0, 20.0, 60.0)
STALL_PARTS = 100  # of the time between two snapshots, one may hold or slow training for one in so many
STAGING_PARTS = 4  # and be copied for one in so many
PACE_SECONDS_MIN = 0.2


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """Commits every so many steps or every so many seconds (at most one is non-zero), and which of them stay.

    In between, snapshots that stay in memory, every `snapshot_steps` or `snapshot_seconds`. With `snapshot_auto` that
    is for ranks that have replicas; where some have none they are more frequent.
    """

    every_steps: int = 0
    every_seconds: float = 60.0
    keep: RetentionPolicy = RetentionPolicy()
    attempt_seconds: float = 1800.0  # after which an attempt that does not end is given up
    snapshot_steps: int = 0
    snapshot_seconds: float = 0.0
    snapshot_auto: bool = False

    @property
    def off(self) -> bool:
        return not self.every_steps and not self.every_seconds

    @property
    def snapshots(self) -> bool:
        """Snapshots are kept in memory between commits."""
        return bool(self.snapshot_steps or self.snapshot_seconds)


@dataclass(frozen=True, slots=True)
class Cadence:
    """What the schedule remembers within one generation."""

    due: float = 0.0  # when the next periodic commit is
    snapshot_due: float = 0.0  # when the next periodic snapshot is
    retry_at: float = 0.0  # no proposal of any kind before: the last snapshot failed, or there was no memory for it
    commit_at: float = 0.0  # none of a commit before: the last one failed
    owed: bool = False  # storage did not take the newest one: the next is not to wait for its period
    beyond: int = 0  # the next step must be greater
    put_off: int = 0  # the step of a commit that a snapshot came before
    lookahead: int = LOOKAHEAD
    refused: bool = False  # the newest proposal came too late
    failures: int = 0  # failed attempts in a row
    last_tries: int = 0  # those of the run's last step
    cause: str = ""  # why the newest of them failed
    pace_seconds: float = PACE_SECONDS_MIN  # between snapshots that are to cost next to nothing


@dataclass(frozen=True, slots=True)
class Proposal:
    step: int
    persist: bool
    put_off: int = 0  # the step of the commit that a snapshot comes before


def next_proposal(
    policy: CheckpointPolicy, cadence: Cadence, furthest: int, total: int, now: float, *, blocked: bool = False
) -> Proposal | None:
    """What to propose now, or None. `furthest`: steps that the front rank finished; `blocked`: no commit, for now.

    A snapshot comes before a commit only where the commit's step can still be armed after it; a commit whose step was
    missed all the same comes first the next time.
    """
    committed = kept = None
    if not policy.off and not blocked and now >= cadence.due:
        step = _next_step(0 if cadence.owed else policy.every_steps, cadence, furthest)
        # The last state is always worth a commit.
        committed = Proposal(min(step, total) if total else step, persist=True)
    if policy.snapshots and now >= cadence.snapshot_due:
        step = _next_step(policy.snapshot_steps, cadence, furthest)
        if not total or step < total:
            kept = Proposal(step, persist=False)
    if committed is not None and committed.step <= furthest:
        committed = None
    if committed is None or kept is None:
        return committed or kept
    missed = 0 < cadence.put_off < committed.step
    if policy.every_steps and not missed and kept.step + cadence.lookahead <= committed.step:
        return replace(kept, put_off=committed.step)
    return committed


def gives_way(cadence: Cadence, step: int, reached: float, instead: Proposal | None) -> bool:
    """Whether a commit that waits for `step` is to be taken back for what would be proposed instead.

    That is a snapshot, long before it. `reached` is where the front rank must be by now.
    """
    return instead is not None and not instead.persist and step > reached + 2 * cadence.lookahead


def _next_step(every: int, cadence: Cadence, furthest: int) -> int:
    if not every:
        return max(furthest, cadence.beyond) + cadence.lookahead
    base = max(furthest, cadence.beyond)
    step = (base // every + 1) * every
    while step < base + cadence.lookahead - 1:
        step += every
    return step


def after_refusal(cadence: Cadence, furthest: int) -> Cadence:
    """The step was too near. The first time it may be that what was known of the ranks was old; now it is new."""
    lookahead = min(cadence.lookahead * 2, LOOKAHEAD_MAX) if cadence.refused else cadence.lookahead
    return replace(cadence, beyond=max(cadence.beyond, furthest), lookahead=lookahead, refused=True)


def after_failure(cadence: Cadence, now: float, cause: str, last: bool = False, taken: bool = False) -> Cadence:
    """`last`: it was to save the run's last step. These are paused for as if nothing had failed before.

    `taken`: it was storage that failed, which is in the way of no snapshot that stays in memory.
    """
    before = cadence.last_tries if last else cadence.failures
    until = now + FAILED_PAUSES_SECONDS[min(before, len(FAILED_PAUSES_SECONDS) - 1)]
    cadence = replace(
        cadence, failures=cadence.failures + 1, last_tries=cadence.last_tries + last, cause=cause, commit_at=until
    )
    return replace(cadence, owed=True) if taken else replace(cadence, retry_at=until)


def paced(cadence: Cadence, cost: Cost) -> Cadence:
    """A snapshot cost so much: by how it was on the whole, so that a single slow one is no rule."""
    held = cost.stall_seconds + cost.taken_seconds
    wanted = max(STALL_PARTS * held, STAGING_PARTS * cost.staging_seconds, PACE_SECONDS_MIN)
    return replace(cadence, pace_seconds=(cadence.pace_seconds + wanted) / 2)


def no_later(policy: CheckpointPolicy, cadence: Cadence, now: float) -> Cadence:
    """Snapshots are due by the policy as it has become, not as it was when the newest one was taken."""
    return replace(cadence, snapshot_due=min(cadence.snapshot_due, now + policy.snapshot_seconds))


def after_snapshot(policy: CheckpointPolicy, cadence: Cadence, now: float) -> Cadence:
    """All ranks have sealed a snapshot, for whatever purpose."""
    less = cadence.lookahead - max(1, cadence.lookahead // LOOKAHEAD_LESS)
    lookahead = max(LOOKAHEAD, less)
    return replace(cadence, snapshot_due=now + policy.snapshot_seconds, lookahead=lookahead, refused=False)


def put_off(cadence: Cadence, now: float) -> Cadence:
    """There is no memory for another snapshot at present."""
    return replace(cadence, retry_at=now + PACE_SECONDS_MIN)


def after_return(cadence: Cadence, step: int) -> Cadence:
    """All ranks go on from `step`: what was done after it is done again. What failed says nothing about this time."""
    return replace(
        cadence, beyond=min(cadence.beyond, step), put_off=0, refused=False, retry_at=0.0, commit_at=0.0, failures=0
    )


def after_taken(cadence: Cadence, step: int) -> Cadence:
    """The snapshot of `step` is taken: nothing more is wanted of the workers for it."""
    return replace(cadence, beyond=max(cadence.beyond, step))


def after_commit(policy: CheckpointPolicy, cadence: Cadence, step: int, now: float) -> Cadence:
    beyond = max(cadence.beyond, step)
    return replace(cadence, beyond=beyond, put_off=0, failures=0, owed=False, due=now + policy.every_seconds)

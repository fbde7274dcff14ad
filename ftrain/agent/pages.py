"""The agent's side of the control pages: arming a step so that it cannot be missed, and reading where workers are.

The rule (docs/protocol.md): the agent stores ARMED and then loads STEP; the worker stores STEP and then loads ARMED.
Both are sequentially consistent, so at least one of them sees the other: a step that this side finds not yet reached
will be seen as armed by the worker when it gets there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ftrain._native import ControlPage
from ftrain.core import node_attempts
from ftrain.core.hangs import Look
from ftrain.core.messages import Attempt
from ftrain.core.page import NO_STEP, RECENT_NS, Field, Phase, verdict_on


@dataclass(frozen=True, slots=True)
class ArmResult:
    ok: bool
    furthest: int
    reached: frozenset[int]  # when not ok: ranks that may have begun the snapshot before they were disarmed


def arm(pages: dict[int, ControlPage], attempt: Attempt, slot: int, hold: bool) -> ArmResult:
    """Arm `attempt.step` on every page, or on none."""
    for page in pages.values():
        page.store(Field.ARMED_SLOT, slot)
        page.store(Field.ARMED_HOLD, int(hold))
        page.store(Field.ARMED_ATTEMPT, attempt.number)
        page.store(Field.ARMED, attempt.step)
        notify(page)
    steps = {rank: page.load(Field.STEP) for rank, page in pages.items()}
    furthest = max(steps.values(), default=NO_STEP)
    if all(_in_time(pages[rank], done, attempt.step) for rank, done in steps.items()):
        return ArmResult(True, furthest, frozenset())
    return ArmResult(False, furthest, disarm(pages, attempt))


def _in_time(page: ControlPage, done: int, step: int) -> bool:
    # At the very last step a worker waits for its snapshot, and sees ARMED however late it comes.
    return done < step or (done == step == page.load(Field.TOTAL_STEPS) and page.load(Field.PHASE) != Phase.DONE)


def disarm(pages: dict[int, ControlPage], attempt: Attempt) -> frozenset[int]:
    """Take the attempt back. Returns the ranks that may have seen it: those that are at its very boundary."""
    for page in pages.values():
        if page.load(Field.ARMED_ATTEMPT) == attempt.number:
            page.store(Field.ARMED, 0)
    return frozenset(rank for rank, page in pages.items() if node_attempts.may_fill(where(page), attempt.step))


def give_verdict(page: ControlPage, attempt: Attempt, leave: bool) -> None:
    page.store(Field.VERDICT, verdict_on(attempt.generation, attempt.number, leave=leave))
    notify(page)


def release(page: ControlPage, generation: int) -> None:
    page.store(Field.RELEASE, generation)
    notify(page)


def revoke(page: ControlPage, generation: int) -> None:
    page.store(Field.REVOKED, generation)
    notify(page)


def notify(page: ControlPage) -> None:
    page.add(Field.EVENT, 1)
    page.wake(Field.EVENT)


def where(page: ControlPage) -> tuple[int, int]:
    """Steps finished, and the phase: still readable when the worker is dead."""
    return page.load(Field.STEP), page.load(Field.PHASE)


def look(page: ControlPage) -> Look:
    """Where a worker stands, how fast it was lately, and whether it asked to be let alone."""
    recent = [page.load(word) for word in RECENT_NS]
    return Look(
        page.load(Field.STEP),
        page.load(Field.PHASE),
        page.load(Field.COLLECTIVE_SEQ),
        page.load(Field.COLLECTIVE_KIND),
        page.load(Field.COLLECTIVE_MARK),
        tuple(taken / 1e9 for taken in recent if taken > 0),
        excused=time.monotonic_ns() < page.load(Field.QUIET_UNTIL_NS),
    )

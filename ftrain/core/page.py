"""The control page: what one worker and its agent tell each other without a system call.

The page is 4 KiB of shared memory seen as 64-bit signed integers, each read and written with sequentially consistent
atomics (`ftrain._native.ControlPage`). Every field has exactly one writer. docs/protocol.md has the argument why a
step that was armed cannot be missed.
"""

from __future__ import annotations

from enum import IntEnum

PAGE_BYTES = 4096
NO_STEP = -1


class Field(IntEnum):
    """Index of each 64-bit word in the page."""

    # Written by the worker.
    STEP = 0  # steps finished; NO_STEP until the worker is in its loop
    PHASE = 1  # a Phase
    PROGRESS_NS = 2  # CLOCK_MONOTONIC at the last change of step or phase
    COLLECTIVE_SEQ = 3  # collectives entered since the worker came into its loop, in this generation
    COLLECTIVE_KIND = 4  # a Collective
    SEALED = 5  # number of the newest attempt whose snapshot is complete in its slot
    FAILED_ATTEMPT = 6  # number of the newest attempt whose snapshot could not be taken
    STALL_NS = 7  # how long the newest snapshot held the training thread
    TOTAL_STEPS = 8  # what the loop was asked for; 0 while unknown
    COLLECTIVE_MARK = 9  # COLLECTIVE_SEQ at the newest boundary
    QUIET_UNTIL_NS = 10  # CLOCK_MONOTONIC until which the user said that this rank will be quiet; 0 for never

    # Written by the agent. ARMED is stored last: whoever sees it sees the other three.
    ARMED = 32  # the step to snapshot at; 0 for none
    ARMED_ATTEMPT = 33  # number of the attempt
    ARMED_SLOT = 34  # the arena's slot to fill
    ARMED_HOLD = 35  # 1: wait at that boundary until VERDICT names the attempt
    VERDICT = 36  # `verdict_on` the newest attempt that is decided
    RELEASE = 37  # the newest generation whose ranks wait for no last snapshot: whoever is at its end leaves
    REVOKED = 39  # the newest generation that is over: whoever is in it stands still
    EVENT = 38  # counts up, and is woken as a futex, after any of the above changed: what a waiting worker waits on


# More words of the worker's: what its latest steps took in nanoseconds, the oldest overwritten; 0 for none yet.
RECENT_NS = range(64, 96)


def verdict_on(generation: int, number: int, *, leave: bool) -> int:
    """The word that decides an attempt: larger in size for a later one, negative where the ranks are to leave.

    A later verdict may be all that a waiting rank gets to see: its own attempt was decided before, and not to leave,
    after which there is no later one.
    """
    word = (generation << 32) + number
    return -word if leave else word


class Phase(IntEnum):
    """Where a worker is in its life."""

    BOOT = 0
    JOINED = 1
    RESTORING = 2
    STEP = 3  # inside a step
    BOUNDARY = 4  # between two steps
    SNAPSHOT = 5
    HOLD = 6  # at a boundary, waiting for the agent's verdict
    LAST = 7  # all steps done, waiting for the last snapshot to be armed
    DONE = 8
    HALTED = 9  # its generation is over: waiting for the one that it goes on in


class Collective(IntEnum):
    """Which collective a worker entered last. Whether it came back is not told: what is entered may be asynchronous."""

    NONE = 0
    ALLREDUCE = 1
    ALLGATHER = 2
    REDUCE_SCATTER = 3
    BROADCAST = 4
    ALLTOALL = 5
    BARRIER = 6
    SEND = 7
    RECV = 8
    REDUCE = 9
    GATHER = 10
    SCATTER = 11

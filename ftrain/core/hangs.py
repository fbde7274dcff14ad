"""Ranks that hang: what standing still means, how long it may last, and who has to go.

A rank *stands still* while its step, its phase and the number of collectives that it has entered stay the same. Most
ranks that do are well: they wait for a slow one. The slow one is told from the hung one by what its process does,
with its children. How long it may stand still depends on that:

    stopped  (SIGSTOP)               it cannot go on by itself; its own agent ends it after a step or two
    idle     no processor, no I/O    a deadlock, a sleep, a lost wake-up, or a very slow answer from elsewhere
    busy     anything else           a compile, an evaluation, a loader; or a kernel that never ends

That is so in the loop. On the way back into it, in place, ranks hang together: when none of them does anything.

All but the stopped ones are judged by the coordinator, which alone sees everybody: a rank hangs only where others wait
for it. One that cannot be told for certain costs no process: the generation is ended in place, and only what does not
come to a halt then is killed. Time is an argument here; what an agent slept through does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import msgspec

from ftrain.core.messages import Hang, Progress, RankExit, RunningRank
from ftrain.core.page import Collective, Phase

GAP_SECONDS_MAX = 1.0  # one look accounts for no more: the agent itself, or the whole machine, may have stood still
USAGE_SECONDS = 1.0  # a rank that stands still is looked into after so long, and so often

STOPPED_SECONDS, STOPPED_STEPS = 0.5, 2.0  # steps of the median
STOPPED_SECONDS_MAX = 10.0  # and where no rank of the node has finished a step yet
IDLE_SECONDS, IDLE_STEPS = 20.0, 10.0  # steps of the slowest recent one
IDLE_SECONDS_FIRST = 300.0
IDLE_SECONDS_ON_THE_WAY = 60.0  # back into the loop
BUSY_SECONDS, BUSY_STEPS = 600.0, 100.0
BUSY_SECONDS_FIRST = 3600.0
BUSY_TOGETHER = 3.0  # times that, where nobody is behind: all may do something long, each by itself
LENIENCY, LENIENT_HANGS_MAX = 4.0, 3  # times so much for each hang in a row without a new step: maybe it was none

DESERTED_SECONDS, DESERTED_STEPS = 1.0, 2.0  # steps of the slowest recent one

# What counts as no use of the processor and no I/O: a watchdog's or a monitor's share.
IDLE_CPU, IDLE_CPU_SECONDS = 0.01, 0.02
IDLE_IO_BYTES_PER_SECOND, IDLE_IO_BYTES = 4 << 10, 64 << 10
AT_WORK_LOOKS = 2  # in a row: a thread that only polls is seen to run now and then

CULPRITS = (Phase.STEP, Phase.BOUNDARY, Phase.SNAPSHOT)  # where a rank can hang
WAITERS = (*CULPRITS, Phase.HOLD, Phase.LAST)  # where one can wait for it
NOT_WATCHED = (Phase.BOOT, Phase.DONE)  # the script does there what it likes
IN_SCRIPT = (Phase.BOOT, Phase.JOINED)  # before it comes to its loop
NAMED_MAX = 8


# --------------------------------------------------------------------------------------------------------- one rank


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its descendants have used up by now."""

    cpu_seconds: float
    io_bytes: int
    processes: frozenset[int]
    at_work: bool  # some thread runs, wants to, or waits for a disk


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a rank: at its control page, and at its process."""

    step: int
    phase: int
    collective: int  # collectives entered since it came into its loop
    kind: int = 0  # of the last one
    mark: int = 0  # `collective` at its newest boundary
    recent_seconds: tuple[float, ...] = ()  # what its latest steps took, in any order
    stopped: bool = False
    excused: bool = False  # the user said that it will be quiet, or a debugger holds it
    usage: Usage | None = None  # None: not looked into this time


@dataclass(frozen=True, slots=True)
class Watch:
    """What the looks at one rank amount to. `still_seconds` and the others count from the last change."""

    look: Look
    looked_at: float
    still_seconds: float = 0.0
    stopped_seconds: float = 0.0
    idle_seconds: float = 0.0
    idle_since: Usage | None = None
    at_work_looks: int = 0  # the latest ones in a row
    used_at: float = -USAGE_SECONDS  # when it was looked into last

    def wants_usage(self, now: float) -> bool:
        """A look at this time should tell what the process uses."""
        return self.still_seconds >= USAGE_SECONDS and now - self.used_at >= USAGE_SECONDS

    @property
    def progress(self) -> Progress:
        """For the coordinator."""
        look = self.look
        return Progress(
            look.collective,
            look.kind,
            look.mark,
            round(self.still_seconds, 3),
            round(self.idle_seconds, 3),
            look.stopped,
            round(median(look.recent_seconds), 6) if look.recent_seconds else 0.0,
            round(max(look.recent_seconds, default=0.0), 6),
        )


def watch(before: Watch | None, look: Look, now: float) -> Watch:
    """Take one more look into account."""
    if before is None:
        return Watch(look, now)
    passed = min(now - before.looked_at, GAP_SECONDS_MAX)
    stopped = before.stopped_seconds + passed if before.look.stopped and look.stopped and not look.excused else 0.0
    if look.excused or _place(look) != _place(before.look):
        return Watch(look, now, stopped_seconds=stopped)
    found = replace(
        before, look=look, looked_at=now, still_seconds=before.still_seconds + passed, stopped_seconds=stopped
    )
    usage, idle = look.usage, before.idle_seconds + passed
    if usage is None:
        return replace(found, idle_seconds=idle) if before.idle_since is not None else found
    found = replace(found, used_at=now, at_work_looks=before.at_work_looks + 1 if usage.at_work else 0)
    if (
        before.idle_since is None
        or found.at_work_looks >= AT_WORK_LOOKS
        or not _is_idle(before.idle_since, usage, idle)
    ):
        return replace(found, idle_since=usage, idle_seconds=0.0)
    return replace(found, idle_seconds=idle)


def _place(look: Look) -> tuple[int, int, int]:
    return look.step, look.phase, look.collective


def _is_idle(since: Usage, now: Usage, seconds: float) -> bool:
    return (
        now.processes == since.processes
        and now.cpu_seconds - since.cpu_seconds <= IDLE_CPU_SECONDS + IDLE_CPU * seconds
        and now.io_bytes - since.io_bytes <= IDLE_IO_BYTES + IDLE_IO_BYTES_PER_SECOND * seconds
    )


def stopped_too_long(watched: Watch, neighbours: Iterable[Watch], awaited: bool = False) -> Hang | None:
    """Whether a rank is to be ended because it was stopped, and how to tell. `neighbours`: all ranks of its node.

    `awaited`: others stand still until this one has come into its loop.
    """
    look = watched.look
    if not watched.stopped_seconds or (look.phase in NOT_WATCHED and not (awaited and look.phase == Phase.BOOT)):
        return None
    steps = [median(one.look.recent_seconds) for one in neighbours if one.look.recent_seconds]
    bound = STOPPED_SECONDS + STOPPED_STEPS * max(steps) if steps else STOPPED_SECONDS_MAX
    if watched.stopped_seconds < min(bound, STOPPED_SECONDS_MAX):
        return None
    place = where(look.step, look.phase, watched.progress)
    return Hang(
        f"it was stopped (SIGSTOP) for {watched.stopped_seconds:.1f} s {place}", seconds=watched.stopped_seconds
    )


def is_still_at(watched: Watch | None, step: int, collective: int) -> bool:
    """Whether a rank that is to be killed for standing still there does so at this moment."""
    return (
        watched is not None
        and (watched.look.step, watched.look.collective) == (step, collective)
        and watched.still_seconds > 0
    )


# --------------------------------------------------------------------------------------------------------- all ranks


@dataclass(frozen=True, slots=True)
class Kill:
    """This rank hangs, at this place."""

    rank: int
    step: int
    collective: int
    hang: Hang


@dataclass(frozen=True, slots=True)
class Cut:
    """The ranks do not come on, and whose fault it is cannot be told. `rank` is the one to name, -1 for none."""

    why: str
    rank: int = -1
    step: int = -1


def leniency(hangs: int) -> float:
    """By what to multiply the bounds after so many hangs in a row that brought no new step."""
    return float(LENIENCY ** min(hangs, LENIENT_HANGS_MAX))


def judge(ranks: Sequence[RunningRank], factor: float = 1.0) -> Kill | Cut | None:
    """Who hangs, of all ranks of a generation, which are in their loop; None while it is too early to say.

    Of ranks at the same step, one is behind another when it has entered fewer collectives. That says something only
    where ranks move in lockstep; otherwise steps alone are compared.
    """
    known = {rank.rank: rank.progress for rank in ranks if rank.progress is not None}
    if len(known) < len(ranks) or not ranks or any(rank.halted for rank in ranks):
        return None
    slowest = max(progress.slowest_seconds for progress in known.values())
    rear = min(rank.step for rank in ranks)
    last = [rank for rank in ranks if rank.step == rear]
    if _in_lockstep([known[rank.rank] for rank in last]):
        fewest = min(known[rank.rank].collective for rank in last)
        last = [rank for rank in last if known[rank.rank].collective == fewest]
    behind = {rank.rank for rank in last}
    ahead = [rank for rank in ranks if rank.rank not in behind]
    if not ahead:
        return _together(last, slowest, factor)
    waited = max((known[rank.rank].still_seconds for rank in ahead if rank.phase in WAITERS), default=0.0)
    if not all(rank.phase in CULPRITS and _due(known[rank.rank], slowest, factor, waited) for rank in last):
        return None
    waiting = [rank.rank for rank in ahead]
    if len(last) > 1:
        names = _named([rank.rank for rank in last])
        seconds = min(known[rank.rank].still_seconds for rank in last)
        why = f"ranks {names} stood still for {seconds:.0f} s after step {rear}, while {waited_for(waiting)}"
        return Cut(why, last[0].rank, rear)
    hung = last[0]
    progress = known[hung.rank]
    place = where(hung.step, hung.phase, progress)
    did = _did(progress, slowest, factor)
    text = f"it stood still for {progress.still_seconds:.0f} s {place}, its process {did}"
    hang = Hang(text, progress.still_seconds, tuple(waiting[:NAMED_MAX]))
    return Kill(hung.rank, hung.step, progress.collective, hang)


def are_deserted(ranks: Sequence[RunningRank]) -> bool:
    """Whether these, all but those of nodes that cannot be reached, wait for something, and so for them.

    A rank whose peer dies in the middle of a message is not always told by its connection.
    """
    progress = [rank.progress for rank in ranks if rank.progress is not None and rank.phase in WAITERS]
    if len(progress) < len(ranks) or not any(one.collective > one.mark for one in progress):
        return False
    bound = max(DESERTED_SECONDS, DESERTED_STEPS * max(one.slowest_seconds for one in progress))
    return all(one.still_seconds >= bound and not one.stopped for one in progress)


def judge_arrival(ranks: Sequence[RunningRank], factor: float = 1.0) -> Cut | None:
    """Whether all ranks of a generation, of which some were alive before it, hang on their way into it."""
    progress = [rank.progress for rank in ranks if rank.progress is not None]
    if not ranks or len(progress) < len(ranks) or any(rank.halted for rank in ranks):
        return None
    in_script = any(rank.phase in IN_SCRIPT for rank in ranks)
    for one in progress:
        bound = max(IDLE_SECONDS_ON_THE_WAY, IDLE_STEPS * one.slowest_seconds)
        if in_script or not one.slowest_seconds:  # its script prepares, or what it does here it does for the first time
            bound = max(IDLE_SECONDS_FIRST, bound)
        if one.stopped or one.idle_seconds < bound * factor:
            return None
    seconds = min(one.idle_seconds for one in progress)
    return Cut(f"no rank did anything for {seconds:.0f} s on the way into the generation")


def attributed(exit: RankExit, ranks: Iterable[RunningRank]) -> RankExit:
    """An exit with the ranks that waited, where the agent that ended it could not see them all."""
    if exit.hang is None or exit.hang.waiting:
        return exit
    waiting = [rank.rank for rank in ranks if rank.progress is not None and rank.progress.still_seconds > 0]
    hang = msgspec.structs.replace(exit.hang, waiting=tuple(sorted(waiting)[:NAMED_MAX]))
    return msgspec.structs.replace(exit, hang=hang)


def _in_lockstep(progress: Sequence[Progress]) -> bool:
    """Whether the ranks, which are at the same step, entered equally many collectives in each step so far."""
    marks = {one.mark for one in progress}
    points = (Collective.SEND, Collective.RECV)  # between two ranks: what the others did says nothing
    return len(marks) == 1 and marks != {0} and not any(one.kind in points for one in progress)


def _together(ranks: Sequence[RunningRank], slowest: float, factor: float) -> Cut | None:
    """Nobody is behind, as far as one can tell. Ranks of which none is in a collective do not wait for each other."""
    found = [(rank, rank.progress) for rank in ranks if rank.progress is not None]
    if len(ranks) < 2 or not any(progress.collective > progress.mark for _, progress in found):
        return None
    due = all(rank.phase in CULPRITS and _due(progress, slowest, factor, together=True) for rank, progress in found)
    if not due:
        return None
    rank, progress = found[0]
    seconds = min(progress.still_seconds for _, progress in found)
    kind = Collective(progress.kind).name.lower() if progress.kind else "a collective"
    why = f"all {len(ranks)} ranks stood still for {seconds:.0f} s after step {rank.step}, in or after {kind}"
    return Cut(f"{why}: a lost link, or a collective that hangs", -1, rank.step)


def _due(
    progress: Progress, slowest: float, factor: float, waited: float = float("inf"), together: bool = False
) -> bool:
    if progress.stopped:
        return False  # its own agent sees to that
    idle, busy = _bounds(progress, slowest, factor)
    busy *= BUSY_TOGETHER if together else 1.0
    return min(progress.idle_seconds, waited) >= idle or min(progress.still_seconds, waited) >= busy


def _bounds(progress: Progress, slowest: float, factor: float) -> tuple[float, float]:
    """How long a rank may stand still, idle or busy."""
    if not progress.slowest_seconds:
        return IDLE_SECONDS_FIRST * factor, BUSY_SECONDS_FIRST * factor
    return max(IDLE_SECONDS, IDLE_STEPS * slowest) * factor, max(BUSY_SECONDS, BUSY_STEPS * slowest) * factor


# ------------------------------------------------------------------------------------------------------------- words


def where(step: int, phase: int, progress: Progress) -> str:
    """In what part of its life a rank stands still."""
    entered = progress.collective - progress.mark
    kind = Collective(progress.kind).name.lower() if progress.kind in set(Collective) else "unknown"
    last = f"after {kind}, number {entered} of the step" if entered > 0 else "before the first collective of the step"
    inside = "in step" if phase == Phase.STEP else f"in phase {Phase(phase).name.lower()} after step"
    return f"{inside} {step} ({last})"


def _did(progress: Progress, slowest: float, factor: float) -> str:
    idle = progress.idle_seconds >= _bounds(progress, slowest, factor)[0]
    return "used no processor and did no I/O" if idle else "was busy"


def waited_for(ranks: Sequence[int]) -> str:
    """Who waited, to be put after "while"."""
    return f"rank {ranks[0]} waited" if len(ranks) == 1 else f"ranks {_named(ranks)} waited"


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - NAMED_MAX} more" if len(ranks) > NAMED_MAX else ""
    return ", ".join(map(str, sorted(ranks)[:NAMED_MAX])) + more

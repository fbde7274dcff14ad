"""The worker's end of what it shares with its agent: control page, arena, channel."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import msgspec

from ftrain._native import ControlPage
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.staging.black_box import BlackBox
from ftrain.core import local
from ftrain.core.local import BOOT_VARIABLE, PACKET_BYTES_MAX, Boot, FromWorker, Recover, ToWorker, WorkerMetrics
from ftrain.core.messages import Attempt, Cost
from ftrain.core.page import NO_STEP, RECENT_NS, Collective, Field, Phase, verdict_on
from ftrain.errors import PeerLost, Preempted, ProtocolError, Unavailable

CAUSE_CHARS_MAX = 4000
WAIT_SECONDS = 3600.0  # a wait is ended by the agent or by its death; this only bounds one sleep of it
QUIET_SECONDS = 4.0  # of a wait for the agent, which are not taken for a hang before it is asked for more

_TO_WORKER: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)


@dataclass(frozen=True, slots=True)
class Armed:
    """A snapshot that the agent asks for: in which slot, and whether to wait for its verdict afterwards."""

    attempt: Attempt
    slot: int
    hold: bool


class Link:
    """Made once, by `join`. The agent reads the page without asking, also after this process is dead."""

    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        for fd in (boot.page_fd, boot.arena_fd, boot.channel_fd, boot.box_fd):
            os.set_inheritable(fd, False)
        self.page = ControlPage(boot.page_fd)
        self.arena = Arena(boot.arena_fd)
        self.box = BlackBox(boot.box_fd)
        self.generation = boot.generation
        self._channel = socket.socket(fileno=boot.channel_fd)
        self._collectives = 0
        self._boundary_ns = 0  # when the newest boundary was reached; 0 before the first in the loop
        self.page.store(Field.STEP, NO_STEP)

    def say(self, message: FromWorker) -> None:
        """Tell the agent. Metrics are dropped when it is behind; everything else waits."""
        flags = socket.MSG_DONTWAIT if isinstance(message, WorkerMetrics) else 0
        # Nobody hears us when the agent is gone; the kernel ends this process then, so there is nothing to do here.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self._channel.send(msgspec.json.encode(message), flags)

    def enter(self, phase: Phase) -> None:
        self.page.store(Field.PROGRESS_NS, time.monotonic_ns())
        self.page.store(Field.PHASE, phase)

    def collective(self, kind: Collective) -> None:
        self._collectives += 1
        self.page.store(Field.COLLECTIVE_KIND, kind)
        self.page.store(Field.COLLECTIVE_SEQ, self._collectives)

    def loops(self, step: int, total_steps: int) -> None:
        """This rank is in its loop: collectives count from here, at all ranks."""
        self._collectives = self._boundary_ns = 0
        self.page.store(Field.COLLECTIVE_SEQ, 0)
        self.page.store(Field.COLLECTIVE_MARK, 0)
        self.page.store(Field.TOTAL_STEPS, total_steps)
        self.page.store(Field.STEP, step)
        self.enter(Phase.STEP)

    def allow(self, until_ns: int) -> int:
        """Until then (CLOCK_MONOTONIC) this rank is not taken for hung. Returns what held before."""
        before = self.page.load(Field.QUIET_UNTIL_NS)
        self.page.store(Field.QUIET_UNTIL_NS, until_ns)
        return before

    def finished(self, step: int) -> Armed | None:
        """Publish a boundary, then look whether it is armed: in this order (docs/protocol.md)."""
        self.enter(Phase.BOUNDARY)
        now = time.monotonic_ns()
        if self._boundary_ns:  # the first step in a loop warms up
            self.page.store(RECENT_NS[step % len(RECENT_NS)], now - self._boundary_ns)
        self._boundary_ns = now
        self.page.store(Field.COLLECTIVE_MARK, self._collectives)
        self.page.store(Field.STEP, step)
        return self.armed(step)

    def armed(self, step: int) -> Armed | None:
        """The attempt that is armed for this very boundary, if there is one."""
        page = self.page
        while page.load(Field.ARMED) == step:
            number = page.load(Field.ARMED_ATTEMPT)
            slot, hold = page.load(Field.ARMED_SLOT), bool(page.load(Field.ARMED_HOLD))
            if page.load(Field.ARMED) == step and page.load(Field.ARMED_ATTEMPT) == number:
                return Armed(Attempt(self.generation, step, number), slot, hold)
            # The attempt was taken back while we looked, and another may be armed by now.
        return None

    def is_armed(self, attempt: Attempt) -> bool:
        """Whether the attempt is still wanted."""
        return self.page.load(Field.ARMED) == attempt.step and self.page.load(Field.ARMED_ATTEMPT) == attempt.number

    def sealed(self, number: int, cost: Cost) -> None:
        self.page.store(Field.STALL_NS, int(cost.stall_seconds * 1e9))
        self.page.store(Field.SEALED, number)
        self.say(local.WorkerSealed(number, cost))

    def not_sealed(self, number: int, cause: str) -> None:
        self.page.store(Field.FAILED_ATTEMPT, number)
        self.say(local.WorkerSealFailed(number, cause[:CAUSE_CHARS_MAX]))

    @property
    def revoked(self) -> bool:
        """The generation that this worker is in is over."""
        return self.page.load(Field.REVOKED) >= self.generation

    def check(self) -> None:
        """Raises `PeerLost` when the generation is over: for waits on the way into it."""
        if self.revoked:
            raise PeerLost(f"generation {self.generation} ended while its ranks were on their way into it")

    def wait_revoked(self, ends: Callable[[], bool]) -> bool:
        """Until the present generation is over; for a thread of its own. False when `ends` says so after a `wake`."""
        while not self.revoked:
            event = self.page.load(Field.EVENT)
            if ends():
                return False
            if not self.revoked:
                self.page.wait(Field.EVENT, event, WAIT_SECONDS)
        return True

    def wake(self) -> None:
        """Let whoever waits in this process look again."""
        self.page.wake(Field.EVENT)

    def halted(self, live: int) -> None:
        """Say that this worker's state stands still: `live` is the step that it is of, -1 where it is of none."""
        self.enter(Phase.HALTED)
        self.say(local.WorkerHalted(self.generation, live, self.box.steps()))

    def wait_recover(self) -> Recover:
        """After `halted`: wait for the generation that this worker goes on in."""
        while True:
            told = self._told()
            if isinstance(told, Recover) and told.generation > self.generation:
                self.generation = told.generation
                return told

    def wait_fetched(self) -> None:
        """Until what this worker goes on from is in its box and arena, however long the agent takes to bring it.

        Does nothing where it was there from the beginning.
        """
        if not self.boot.fetched:
            return
        allowed = self.page.load(Field.QUIET_UNTIL_NS)
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while not poll.poll(1000 * QUIET_SECONDS / 2):
            self.allow(time.monotonic_ns() + int(QUIET_SECONDS * 1e9))  # one that is stopped here does not get so far
        self._told()
        self.allow(allowed)

    def _told(self) -> ToWorker:
        packet = self._channel.recv(PACKET_BYTES_MAX)
        if not packet:
            raise Unavailable("this worker's agent is gone")
        return _TO_WORKER.decode(packet)

    def hold(self, attempt: Attempt) -> None:
        """Wait for the agent's verdict, or for the end of the generation. Raises `Preempted` when it is to leave."""
        self.enter(Phase.HOLD)
        mine = verdict_on(attempt.generation, attempt.number, leave=False)
        while abs(verdict := self.page.load(Field.VERDICT)) < mine:
            event = self.page.load(Field.EVENT)
            if self.revoked:
                return
            if abs(self.page.load(Field.VERDICT)) < mine:
                self.page.wait(Field.EVENT, event, WAIT_SECONDS)
        if verdict == -mine:
            raise Preempted

    def wait_armed(self, step: int, seen: int) -> Armed | None:
        """At the last boundary: the next attempt that is armed for it, or None when the agent needs no more.

        None as well when the generation is over.
        """
        page = self.page
        while True:
            event = page.load(Field.EVENT)
            if page.load(Field.RELEASE) >= self.generation or self.revoked:
                return None
            self.enter(Phase.BOUNDARY)
            armed = self.armed(step)
            if armed is not None and armed.attempt.number > seen:
                return armed
            self.enter(Phase.LAST)
            page.wait(Field.EVENT, event, WAIT_SECONDS)


def from_environment() -> Link | None:
    """The link to our agent; None when no `ftrain launch` started this process. To be taken only once."""
    found = os.environ.pop(BOOT_VARIABLE, None)
    if found is None:
        return None
    try:
        boot = msgspec.json.decode(found, type=Boot)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"{BOOT_VARIABLE} does not come from this version of ftrain: {error}") from None
    return Link(boot)


def leave_signals_to_agent() -> None:
    """SIGTERM reaches whole process groups on clusters, but when and how to leave is the agent's to say.

    Forked children, such as a data loader's, get the default back: somebody must be able to end them.
    """
    signal.signal(signal.SIGTERM, _ignore)
    os.register_at_fork(after_in_child=_restore_default)


def _ignore(number: int, frame: FrameType | None) -> None:
    del number, frame


def _restore_default() -> None:
    if signal.getsignal(signal.SIGTERM) is _ignore:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

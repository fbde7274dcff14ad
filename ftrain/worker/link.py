"""The worker's end of what it shares with its agent: control page, arena, channel."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from types import FrameType

import msgspec

from ftrain._native import ControlPage
from ftrain.checkpoint.arena import Arena
from ftrain.core import local
from ftrain.core.local import BOOT_VARIABLE, Boot, FromWorker, WorkerMetrics
from ftrain.core.messages import Attempt
from ftrain.core.page import Collective, Field, Phase
from ftrain.errors import Preempted, ProtocolError

WAIT_SECONDS = 3600.0  # a wait is ended by the agent or by its death; this only bounds one sleep of it


class Link:
    """Made once, by `join`. The agent reads the page without asking, also after this process is dead."""

    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        for fd in (boot.page_fd, boot.arena_fd, boot.channel_fd):
            os.set_inheritable(fd, False)
        self.page = ControlPage(boot.page_fd)
        self.arena = Arena(boot.arena_fd)
        self._channel = socket.socket(fileno=boot.channel_fd)
        self._collectives = 0

    def say(self, message: FromWorker) -> None:
        """Tell the agent. Metrics are dropped when it is behind; everything else waits."""
        flags = socket.MSG_DONTWAIT if isinstance(message, WorkerMetrics) else 0
        with contextlib.suppress(BlockingIOError):
            self._channel.send(msgspec.json.encode(message), flags)

    def enter(self, phase: Phase) -> None:
        self.page.store(Field.PROGRESS_NS, time.monotonic_ns())
        self.page.store(Field.PHASE, phase)

    def collective(self, kind: Collective) -> None:
        self._collectives += 1
        self.page.store(Field.COLLECTIVE_KIND, kind)
        self.page.store(Field.COLLECTIVE_SEQ, self._collectives)

    def finished(self, step: int) -> int:
        """Publish a boundary, then look whether it is armed, in this order. Returns the attempt or 0."""
        page = self.page
        self.enter(Phase.BOUNDARY)
        page.store(Field.STEP, step)
        return page.load(Field.ARMED_ATTEMPT) if page.load(Field.ARMED) == step else 0

    def armed(self, number: int) -> tuple[Attempt, int, bool]:
        """The attempt to take part in, the slot to fill, and whether to wait for a verdict afterwards."""
        page = self.page
        attempt = Attempt(self.boot.generation, page.load(Field.STEP), number)
        return attempt, page.load(Field.ARMED_SLOT), bool(page.load(Field.ARMED_HOLD))

    def sealed(self, number: int, seconds: float) -> None:
        self.page.store(Field.STALL_NS, int(seconds * 1e9))
        self.page.store(Field.SEALED, number)
        self.say(local.WorkerSealed(number, seconds))

    def not_sealed(self, number: int, cause: str) -> None:
        self.page.store(Field.FAILED_ATTEMPT, number)
        self.say(local.WorkerSealFailed(number, cause))

    def hold(self, number: int) -> None:
        """Wait for the agent's verdict. Raises `Preempted` when it is to leave."""
        self.enter(Phase.HOLD)
        while abs(verdict := self.page.load(Field.VERDICT)) != number:
            event = self.page.load(Field.EVENT)
            if abs(self.page.load(Field.VERDICT)) != number:
                self.page.wait(Field.EVENT, event, WAIT_SECONDS)
        if verdict < 0:
            raise Preempted

    def wait_armed(self, step: int, seen: int) -> int:
        """At the last boundary: the next attempt that is armed for it, or 0 when the agent needs no more."""
        page = self.page
        while True:
            event = page.load(Field.EVENT)
            if page.load(Field.RELEASE):
                return 0
            self.enter(Phase.BOUNDARY)
            number = page.load(Field.ARMED_ATTEMPT)
            if page.load(Field.ARMED) == step and number > seen:
                return number
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

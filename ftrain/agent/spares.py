"""Processes that are forked before anybody needs them, so that a lost rank's successor is there at once.

A fork of a process that has torch takes 15 to 40 ms, and so does the next one beside it. A spare has it behind it, and
has touched as much memory as a rank of this run needs, at leisure. It knows nothing of the run before it gets its job.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ftrain.agent.child import Job
from ftrain.agent.heap import HeapRoom

SLICE_BYTES = 4 << 20  # touched at a time; it takes some milliseconds
PAUSE_PARTS = 8  # so many times as long nothing is touched: training needs the memory's bandwidth, and the core
KILLED_FIRST = "1000"  # of oom_score_adj: the host that is out of memory takes the spare's back before a rank's
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_JOB = msgspec.json.Decoder(Job)


@dataclass(slots=True)
class Spare:
    """As its nursery holds it."""

    pid: int
    for_rank: bool  # rather than for a store
    channel: socket.socket

    def give(self, job: Job, fds: Sequence[int]) -> bool:
        """Give it its job. False where it is not there any more."""
        try:
            socket.send_fds(self.channel, [msgspec.json.encode(job)], list(fds))
        except OSError:
            return False
        finally:
            self.channel.close()
        return True


def wait_for_job(channel: socket.socket, heap_bytes: int, packet_bytes_max: int, fds_max: int) -> tuple[Job, list[int]]:
    """In the spare itself: make room in the heap until there is a job. Ends the process where none can come."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    with channel, _killed_first(), contextlib.suppress(ConnectionResetError):
        room = HeapRoom(heap_bytes)
        began = time.monotonic()
        while room.touch(SLICE_BYTES) and not poll.poll(1000 * PAUSE_PARTS * (time.monotonic() - began)):
            began = time.monotonic()
        packet, fds, _, _ = socket.recv_fds(channel, packet_bytes_max, fds_max)
        if packet:
            return _JOB.decode(packet), fds
    os._exit(0)


@contextlib.contextmanager
def _killed_first() -> Iterator[None]:
    before = _OOM_SCORE.read_text()
    with contextlib.suppress(OSError):  # where /proc may not be written to
        _OOM_SCORE.write_text(KILLED_FIRST)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _OOM_SCORE.write_text(before)

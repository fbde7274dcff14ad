"""DESIGN's handshake without a collective: a step that was armed and accepted is never missed.

The worker stores STEP and then loads ARMED, the agent stores ARMED and then loads STEP (docs/protocol.md). With weaker
ordering than sequential consistency both could read the other's old value: the agent accepts, and the worker passes by.
Each round is one such meeting at one step. Both leave the start at once, and short delays sweep who is first.
"""

from __future__ import annotations

import os
import subprocess
import sys

from ftrain._native import ControlPage
from ftrain.core.page import Field

ROUNDS = 20_000
START, FINISHED = (
    100,
    101,
)  # words of this test alone: the round that may begin, the newest that the worker is done with

WORKER = f"""
import os, sys
from ftrain._native import ControlPage
page = ControlPage(int(sys.argv[1]))
for step in range(1, {ROUNDS} + 1):
    while page.load({START}) < step:
        os.sched_yield()
    for _ in range(step % 8):
        pass
    page.store({Field.STEP:d}, step)
    if page.load({Field.ARMED:d}) == step:
        page.store({Field.SEALED:d}, step)
    page.store({FINISHED}, step)
"""


def test_accepted_step_is_never_missed_between_two_processes() -> None:
    fd = ControlPage.create("arming")
    page = ControlPage(fd)
    missed = []
    with subprocess.Popen([sys.executable, "-c", WORKER, str(fd)], pass_fds=[fd]) as worker:
        os.close(fd)
        for step in range(1, ROUNDS + 1):
            page.store(START, step)
            for _ in range(step // 8 % 8):
                pass
            accepted = arm(page, step)
            while page.load(FINISHED) < step:
                assert worker.poll() in (None, 0)
                os.sched_yield()
            if accepted and page.load(Field.SEALED) != step:
                missed.append(step)
    assert worker.returncode == 0
    assert missed == []


def arm(page: ControlPage, step: int) -> bool:
    """Whether the worker is sure to snapshot at `step`: it had not reached it when the order was in place."""
    page.store(Field.ARMED, step)
    return page.load(Field.STEP) < step

"""What processes do when their relatives die."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftrain._native import set_parent_death_signal

# A parent with one child, which says its pid once it is tied to its parent. Both would sleep for ever.
TIED_CHILD = """
import os, signal, sys
from ftrain._native import set_parent_death_signal
if os.fork() == 0:
    set_parent_death_signal(signal.SIGKILL)
    os.write(1, b"%d\\n" % os.getpid())
signal.pause()
"""

# A grandfather adopts the grandchild whose parent ended, and says what became of it.
ADOPTION = """
import os
from ftrain._native import set_child_subreaper
set_child_subreaper(True)
reader, writer = os.pipe()
grandfather = os.getpid()
child = os.fork()
if child == 0:
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)  # until the grandfather says so
        os._exit(7 if os.getppid() == grandfather else 8)
    os._exit(0)
os.waitpid(child, 0)
os.write(writer, b"x")
_, status = os.waitpid(-1, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


def test_child_dies_with_its_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", TIED_CHILD], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child_fd = os.pidfd_open(int(parent.stdout.readline()))
        assert select.select([child_fd], [], [], 0)[0] == []
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert select.select([child_fd], [], [], 60)[0] == [child_fd]
        os.close(child_fd)


def test_orphan_is_adopted_by_the_subreaper() -> None:
    assert subprocess.run([sys.executable, "-c", ADOPTION], check=False, timeout=60).returncode == 7


def test_signal_that_does_not_exist_raises_os_error() -> None:
    with pytest.raises(OSError, match="signal 9999") as caught:
        set_parent_death_signal(9999)
    assert caught.value.errno == 22


# A child that leaves SIGTERM to its parent says its pid; the parent passes on what it reads as a signal to it.
LEFT_TO_PARENT = """
import os, signal, sys
from ftrain._native import leave_sigterm_to_parent
child = os.fork()
if child == 0:
    leave_sigterm_to_parent()
    os.write(1, b"%d\\n" % os.getpid())
    while True:
        signal.pause()
os.read(0, 1)
os.kill(child, signal.SIGTERM)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_sigterm_is_obeyed_only_where_the_parent_sends_it() -> None:
    command = [sys.executable, "-c", LEFT_TO_PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        child = int(parent.stdout.readline())
        child_fd = os.pidfd_open(child)
        for _ in range(3):
            os.kill(child, signal.SIGTERM)
            wait_for_sleep(child)
        assert select.select([child_fd], [], [], 0)[0] == []
        parent.stdin.write(b"x")
        parent.stdin.flush()
        assert parent.wait(60) == 0
        assert select.select([child_fd], [], [], 60)[0] == [child_fd]
        os.close(child_fd)


def wait_for_sleep(pid: int) -> None:
    """Until the signal has been taken in: it is not pending any more, and the process sleeps again."""
    status = Path(f"/proc/{pid}/status")
    while True:
        fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        if int(fields["SigPnd"], 16) == int(fields["ShdPnd"], 16) == 0 and fields["State"].startswith("S"):
            return

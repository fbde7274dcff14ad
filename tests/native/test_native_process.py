"""What processes do when their relatives die."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

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

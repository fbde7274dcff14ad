"""What /proc says of real processes that stop, sleep, work, write, and have children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftrain.agent import activity, stacks
from tests.launching.harness import wait_for

Program = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def program() -> Iterator[Program]:
    """Runs Python code that prints a line when it is there, and then does what it is to do."""
    started = []

    def start(code: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_sleeping_process_uses_nothing(program: Program) -> None:
    pid = program("import time; print(flush=True); time.sleep(100)").pid
    wait_for(lambda: activity.state(pid) == "S", "its sleep")
    before = activity.usage(pid)
    assert before.processes == {pid}
    assert not before.at_work
    assert activity.usage(pid) == before


def test_computing_process_is_at_work_and_uses_the_processor(program: Program) -> None:
    pid = program("print(flush=True)\nwhile True: pass").pid
    before = activity.usage(pid)
    assert before.at_work
    wait_for(lambda: activity.usage(pid).cpu_seconds > before.cpu_seconds + 0.05, "its use of the processor")


def test_childs_child_counts_as_the_process_itself(program: Program) -> None:
    spin = "while True: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    pid = program(f"import subprocess, sys; print(flush=True); subprocess.run([sys.executable, '-c', {child!r}])").pid
    wait_for(lambda: len(activity.usage(pid).processes) == 3, "its child's child")
    assert activity.usage(pid).at_work
    before = activity.usage(pid).cpu_seconds
    wait_for(lambda: activity.usage(pid).cpu_seconds > before + 0.05, "its use of the processor")
    os.kill(pid, signal.SIGSTOP)  # the child's child goes on
    wait_for(lambda: activity.state(pid) == "T", "its stop")
    for one in activity.usage(pid).processes - {pid}:
        os.kill(one, signal.SIGKILL)


def test_bytes_written_count_however_few_the_processor_needs(program: Program) -> None:
    code = "print(flush=True); input(); open('/dev/null', 'wb', 0).write(bytes(1 << 20)); print(flush=True); input()"
    process = program(code)
    assert process.stdin is not None
    before = activity.usage(process.pid).io_bytes
    process.stdin.write(b"\n")
    process.stdin.flush()
    wait_for(lambda: activity.usage(process.pid).io_bytes >= before + (1 << 20), "its bytes")


def test_stopped_process_is_seen_to_be_and_one_that_goes_on_too(program: Program) -> None:
    pid = program("import time; print(flush=True); time.sleep(100)").pid
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: activity.state(pid) == activity.STOPPED, "its stop")
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: activity.state(pid) == "S", "its sleep")


def test_process_that_a_debugger_holds_is_not_taken_for_stopped(program: Program) -> None:
    trace = "import ctypes, os; print(flush=True); ctypes.CDLL(None).ptrace(0, 0, 0, 0); os.kill(os.getpid(), 11)"
    pid = program(trace).pid  # its parent, this process, traces it
    wait_for(lambda: activity.state(pid) == activity.TRACED, "its debugger's hold")
    os.kill(pid, signal.SIGKILL)  # not by Popen, which takes what it is told of a tracing stop for an end


def test_process_that_is_gone_has_no_state_and_uses_nothing(program: Program) -> None:
    process = program("print(flush=True)")
    process.communicate()
    assert activity.state(process.pid) == ""
    assert activity.usage(process.pid).cpu_seconds == 0
    assert not activity.usage(process.pid).at_work


async def test_worker_that_does_not_answer_has_no_stack(tmp_path: Path) -> None:
    asked: list[int] = []
    assert await stacks.dump(lambda: asked.append(1), tmp_path / "stderr.log") == ""
    assert asked == [1]

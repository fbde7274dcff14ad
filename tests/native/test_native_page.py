"""The control page, within one process and between two."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from ftrain._native import ControlPage
from ftrain.core.page import PAGE_BYTES, Field, Phase

INT64_MAX = 2**63 - 1
INT64_MIN = -(2**63)

# Echoes word 0 into word 1, plus one, until word 0 is negative.
ECHO = """
import math, sys
from ftrain._native import ControlPage
page = ControlPage(int(sys.argv[1]))
seen = 0
while True:
    page.wait(0, seen, math.inf)
    seen = page.load(0)
    if seen < 0:
        break
    page.store(1, seen + 1)
    page.wake(1)
"""


@pytest.fixture
def page_fd() -> Iterator[int]:
    fd = ControlPage.create("test-page")
    yield fd
    os.close(fd)


def test_new_page_is_zero_sealed_and_close_on_exec(page_fd: int) -> None:
    page = ControlPage(page_fd)
    assert [page.load(i) for i in range(PAGE_BYTES // 8)] == [0] * 512
    assert not os.get_inheritable(page_fd)
    with pytest.raises(PermissionError):
        os.ftruncate(page_fd, 0)


@pytest.mark.parametrize("value", [0, 1, -1, 2**32, INT64_MAX, INT64_MIN])
def test_stored_word_is_loaded_unchanged(page_fd: int, value: int) -> None:
    page = ControlPage(page_fd)
    page.store(511, value)
    assert page.load(511) == value
    assert page.load(510) == 0


def test_fields_and_phases_serve_as_index_and_value(page_fd: int) -> None:
    page = ControlPage(page_fd)
    page.store(Field.PHASE, Phase.SNAPSHOT)
    assert Phase(page.load(Field.PHASE)) is Phase.SNAPSHOT


def test_add_returns_new_value_and_wraps(page_fd: int) -> None:
    page = ControlPage(page_fd)
    assert page.add(3, 5) == 5
    assert page.add(3, -7) == -2
    page.store(3, INT64_MAX)
    assert page.add(3, 1) == INT64_MIN


@pytest.mark.parametrize("index", [-1, 512, 2**40])
def test_word_outside_page_raises_index_error(page_fd: int, index: int) -> None:
    page = ControlPage(page_fd)
    with pytest.raises(IndexError, match="words 0 to 511"):
        page.load(index)
    with pytest.raises(IndexError):
        page.store(index, 1)
    with pytest.raises(IndexError):
        page.wait(index, 0, 0.0)
    with pytest.raises(IndexError):
        page.wake(index)


def test_value_beyond_64_bits_is_refused(page_fd: int) -> None:
    with pytest.raises(TypeError):
        ControlPage(page_fd).store(0, 2**63)


def test_closed_page_raises_value_error(page_fd: int) -> None:
    page = ControlPage(page_fd)
    page.close()
    page.close()
    with pytest.raises(ValueError, match="closed"):
        page.load(0)


def test_bad_descriptor_raises_os_error_with_errno() -> None:
    fd = ControlPage.create("gone")
    os.close(fd)
    with pytest.raises(OSError, match=f"fd {fd}") as caught:
        ControlPage(fd)
    assert caught.value.errno == 9


def test_file_shorter_than_page_is_refused() -> None:
    fd = os.memfd_create("short")
    with pytest.raises(ValueError, match="holds 0 bytes"):
        ControlPage(fd)
    os.close(fd)


def test_wait_on_other_value_returns_true_at_once(page_fd: int) -> None:
    assert ControlPage(page_fd).wait(0, 1, math.inf)


def test_wait_compares_all_64_bits(page_fd: int) -> None:
    page = ControlPage(page_fd)
    page.store(0, 2**32)  # its low half, which the futex sees, equals that of 0
    assert page.wait(0, 0, math.inf)


@pytest.mark.parametrize("timeout", [0.0, -1.0, 0.01])
def test_wait_on_unchanged_word_returns_false_at_timeout(page_fd: int, timeout: float) -> None:
    assert not ControlPage(page_fd).wait(0, 0, timeout)


def test_waiter_that_is_woken_without_a_change_returns_false(page_fd: int) -> None:
    page = ControlPage(page_fd)
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(page.wait(0, 0, math.inf)))
    waiter.start()
    while not sleeps_on_shared_futex(waiter):
        time.sleep(0.001)
    page.wake(0)
    waiter.join()
    assert answers == [False]


def test_wait_with_nan_timeout_is_refused(page_fd: int) -> None:
    with pytest.raises(ValueError, match="not a number"):
        ControlPage(page_fd).wait(0, 0, math.nan)


def test_page_closed_during_wait_stays_mapped_for_the_waiter(page_fd: int) -> None:
    page, other = ControlPage(page_fd), ControlPage(page_fd)
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(page.wait(0, 0, math.inf)))
    waiter.start()
    while not sleeps_on_shared_futex(waiter):
        time.sleep(0.001)
    page.close()
    other.store(0, 1)
    other.wake(0)
    waiter.join()
    assert answers == [True]


def sleeps_on_shared_futex(thread: threading.Thread) -> bool:
    """Whether the thread is in a futex call whose operation is FUTEX_WAIT_BITSET without the private flag."""
    call = Path(f"/proc/self/task/{thread.native_id}/syscall")
    if not call.exists():
        pytest.skip("this kernel does not show what a thread waits in")
    fields = call.read_text().split()
    return len(fields) > 2 and fields[2] == "0x9"


def test_two_processes_answer_each_other_through_the_page(page_fd: int) -> None:
    page = ControlPage(page_fd)
    with subprocess.Popen([sys.executable, "-c", ECHO, str(page_fd)], pass_fds=[page_fd]) as echo:
        for i in range(1, 200):
            page.store(0, i)
            page.wake(0)
            assert page.wait(1, 0 if i == 1 else i, 60.0)
            assert page.load(1) == i + 1
        page.store(0, -1)
        page.wake(0)
        assert echo.wait() == 0


def test_signal_handler_runs_during_wait_and_ends_it_by_its_store(page_fd: int) -> None:
    page = ControlPage(page_fd)

    def handler(_signum: int, _frame: FrameType | None) -> None:
        page.store(0, 1)  # no wake: the wait itself looks again after the handler

    with alarm(handler):
        assert page.wait(0, 0, math.inf)


def test_exception_of_a_signal_handler_comes_out_of_wait(page_fd: int) -> None:
    def handler(_signum: int, _frame: FrameType | None) -> None:
        raise InterruptedError("told to stop")

    with alarm(handler), pytest.raises(InterruptedError, match="told to stop"):
        ControlPage(page_fd).wait(0, 0, math.inf)


@contextmanager
def alarm(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGALRM every 20 ms while in the block: again and again, for one may come just before the sleep begins."""
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

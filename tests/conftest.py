"""What holds for the whole suite: no process outlives it, the longest files come first, what failed once is shown.

A test of real processes, signals and disks is at the mercy of whatever else the machine does, so it is tried a second
time. What a first try said is printed at the end all the same: it may be a fault that strikes one time in a thousand.
"""

from __future__ import annotations

import gc
import os
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

# Every process that a test starts inherits this variable, so it is found even after its parents are gone.
MARK_NAME = "FTRAIN_TEST_SESSION"
MARK = uuid.uuid4().hex
EXIT_SECONDS_MAX = 60.0  # for processes that are on their way out when the last test ends
# Begun first, so that none of them is what all others wait for in the end.
LONGEST = (
    "native/test_native_sanitizers.py",
    "chaos/",
    "launch/",
    "recovery/",
    "launching/",
    "examples/",
    "tools/test_story.py",
    "simulator/",
    "crash/",
    "power/",
    "checkpoint/test_bench_checkpoint.py",
    "native/test_native_cuda_staging.py",
    "worker/test_worker_data.py",
    "checkpoint/test_save.py",
    "native/test_native_cuda_faults.py",
    "worker/",
    "checkpoint/",
)
# Nothing outside has a say in these: they pass at once or fail.
DETERMINISTIC = ("attacks/", "core/", "crash/", "fuzz/", "simulator/", "test_house.py")
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # Python's own, which end with pytest


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore Ctrl-C, and whatever tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: tests of real processes wait more than they compute."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those of the most tests. Within a file the order stays."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (_place(item.path), -sizes[item.path], item.path))
    for item in items:
        if not _name(item.path).startswith(DETERMINISTIC):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The failures that a second try did not repeat: pytest itself shows those of a last try only."""
    failed = {report.nodeid for report in terminalreporter.getreports("failed")}
    once = [report for report in terminalreporter.getreports("rerun") if report.nodeid not in failed]
    if once:
        terminalreporter.section("FAILED ONCE", red=True)
    for report in once:
        terminalreporter.write_sep("_", report.head_line or report.nodeid)
        terminalreporter.line(report.longreprtext)


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the end: no `gc.collect` of a test goes through it again."""
    gc.collect()
    gc.freeze()


def _place(path: Path) -> int:
    return next((place for place, start in enumerate(LONGEST) if _name(path).startswith(start)), len(LONGEST))


def _name(path: Path) -> str:
    return path.relative_to(Path(__file__).parent).as_posix()


def leftovers() -> list[psutil.Process]:
    """Our living descendants, and whatever carries this session's mark."""
    me = psutil.Process()
    descendants = {child.pid for child in me.children(recursive=True)}
    return [p for p in psutil.process_iter() if p.pid != me.pid and is_leftover(p, p.pid in descendants)]


def is_leftover(process: psutil.Process, is_descendant: bool) -> bool:
    try:
        command = " ".join(process.cmdline())
        if process.status() == psutil.STATUS_ZOMBIE or any(helper in command for helper in HELPERS):
            return False
        return is_descendant or process.environ().get(MARK_NAME) == MARK
    except psutil.Error:  # it ended while we looked, or belongs to someone else
        return False


def describe(process: psutil.Process) -> str:
    try:
        return f"pid {process.pid} (parent {process.ppid()}): {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"pid {process.pid}: gone meanwhile"


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    os.environ[MARK_NAME] = MARK
    yield
    _, alive = psutil.wait_procs(leftovers(), timeout=EXIT_SECONDS_MAX)
    if alive:
        report = "\n  ".join(describe(process) for process in alive)
        for process in alive:
            process.kill()
        pytest.fail(f"the tests left {len(alive)} process(es), now killed:\n  {report}", pytrace=False)

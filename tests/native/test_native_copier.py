"""Copies in threads of their own: what arrives, who may wait, what they take, and what becomes without a copier."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain._native import Copier, CopyPlan
from tests.native.engine import Memory, random_bytes, threads, words

MIB = 1 << 20


def plan_of(source: Memory, pieces: list[tuple[int, int, int]]) -> CopyPlan:
    """Of (offset in the target, offset in the source, bytes)."""
    return CopyPlan(
        words(*(to for to, _, _ in pieces)),
        words(*(source.address + start for _, start, _ in pieces)),
        words(*(nbytes for _, _, nbytes in pieces)),
    )


@pytest.mark.parametrize("count", [1, 3])
def test_copies_of_all_sizes_arrive_at_their_offsets(count: int) -> None:
    sizes = [0, 1, 4095, 0, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB + 7, 13, 0]
    pieces, at = [], 0
    for nbytes in sizes:
        pieces.append((at + 1, at, nbytes))
        at += nbytes
    source, target = Memory(random_bytes(1, at)), Memory(at + 2)
    plan = plan_of(source, pieces)
    job = Copier(count).begin(plan, target.address)
    job.wait()
    assert job.done()
    assert plan.nbytes == at
    assert target.bytes() == b"\0" + source.bytes() + b"\0"


@given(
    pieces=st.lists(st.tuples(st.integers(0, 100), st.sampled_from([0, 1, 63, 64, 4096, 5000, 700_000])), max_size=12),
    base=st.integers(0, 100),
)
@settings(max_examples=50, deadline=None)
def test_any_plan_copies_its_bytes_and_no_others(pieces: list[tuple[int, int]], base: int) -> None:
    source = Memory(random_bytes(2, MIB))
    rows, at = [], 0
    for gap, nbytes in pieces:
        rows.append((at + gap, gap, nbytes))
        at += gap + nbytes
    target = Memory(b"\xa5" * (base + at + 1))
    expected = bytearray(target.bytes())
    for to, start, nbytes in rows:
        expected[base + to : base + to + nbytes] = source.bytes()[start : start + nbytes]
    Copier(2).begin(plan_of(source, rows), target.address + base).wait()
    assert target.bytes() == bytes(expected)


def test_plan_is_run_again_to_another_base_and_with_what_is_there_then() -> None:
    source = Memory(random_bytes(3, 2 * MIB))
    plan = plan_of(source, [(0, 0, source.nbytes)])
    copier = Copier(1)
    for seed in (4, 5):
        source.fill(random_bytes(seed, source.nbytes))
        target = Memory(source.nbytes)
        copier.begin(plan, target.address).wait()
        assert target.bytes() == source.bytes()


def test_many_jobs_are_all_done_whoever_waits_first() -> None:
    source = Memory(random_bytes(6, 3 * MIB))
    plan = plan_of(source, [(0, 0, source.nbytes)])
    copier = Copier(2)
    targets = [Memory(source.nbytes) for _ in range(12)]
    jobs = [copier.begin(plan, target.address) for target in targets]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: job.wait(), [*reversed(jobs), *jobs]))
    assert all(job.done() for job in jobs)
    assert all(target.bytes() == source.bytes() for target in targets)


def test_empty_plan_is_done_at_once() -> None:
    copier = Copier(1)
    for plan in (CopyPlan(words(), words(), words()), CopyPlan(words(5, 6), words(0, 0), words(0, 0))):
        job = copier.begin(plan, 0)
        assert plan.nbytes == 0 and job.done()
        job.wait()


def test_dropped_copier_ends_its_threads_and_its_jobs_can_still_be_waited_for() -> None:
    before = threads()
    source = Memory(random_bytes(7, 8 * MIB))
    plan = plan_of(source, [(0, 0, source.nbytes)])
    copier = Copier(2)
    targets = [Memory(source.nbytes) for _ in range(4)]
    jobs = [copier.begin(plan, target.address) for target in targets]
    del copier, plan
    assert threads() <= before
    for job, target in zip(jobs, targets, strict=True):
        job.wait()
        assert target.bytes() == source.bytes()


def test_wrong_plans_and_copiers_are_refused() -> None:
    with pytest.raises(ValueError, match="null address"):
        CopyPlan(words(0), words(0), words(1))
    with pytest.raises(ValueError, match="address space"):
        CopyPlan(words(0, 0), words(1, 1), words(2**63, 2**63))
    with pytest.raises(ValueError, match="differ in length"):
        CopyPlan(words(0), words(), words())
    with pytest.raises(ValueError, match="64-bit"):
        CopyPlan(bytes(8), words(1), words(1))
    with pytest.raises(ValueError, match="at least one thread"):
        Copier(0)


BEGIN = """
import mmap, os, signal, sys, time
from array import array
from ftrain._native import Copier, CopyPlan, Mapping, memory_file

signal.alarm(60)
NBYTES = 4 << 20
copier = None
fd = memory_file("memory")
os.ftruncate(fd, 2 * NBYTES)
memory = Mapping(fd, 2 * NBYTES)
memory.view()[:NBYTES] = os.urandom(NBYTES)

def plan():
    return CopyPlan(array("Q", [0]), array("Q", [memory.address]), array("Q", [NBYTES]))

def copied():
    return memory.view()[NBYTES:] == memory.view()[:NBYTES]
"""

# The copying thread is the last that holds the plan, while its copier is waiting for it with the GIL.
DROP_ALL = """
for number in range(100):
    copier = Copier(2)
    copier.begin(plan(), memory.address + NBYTES)
    if number % 2:
        time.sleep(0.0002)
    del copier
print("ended")
"""

FORK = """
copier = Copier(2)
copier.begin(plan(), memory.address + NBYTES).wait()
memory.view()[NBYTES:] = bytes(NBYTES)
time.sleep(0.1)  # so that its threads are likely to sleep by now
child = os.fork()
if child == 0:
    signal.alarm(60)
    job = copier.begin(plan(), memory.address + NBYTES)
    assert not job.done()
    job.wait()
    assert job.done() and copied()
    copier = None
    copier = Copier(1)
    copier.begin(plan(), memory.address + NBYTES).wait()
    copier = None
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
copier.begin(plan(), memory.address + NBYTES).wait()
print("ended")
"""

# The interpreter goes while copies are under way; it takes the copier before the memory, as their names were made.
EXIT = """
copier = Copier(2)
jobs = [copier.begin(plan(), memory.address + NBYTES) for _ in range(50)]
print("ended")
"""


@pytest.mark.parametrize("program", [DROP_ALL, FORK, EXIT], ids=["everything-dropped", "forked", "exit"])
def test_process_ends_whatever_becomes_of_its_copier(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program], check=False, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_time_taken_from_others_is_what_was_waited_for_a_processor() -> None:
    """One processor, and another process that never lets go of it: the copying threads wait half of the time."""
    script = """
import ctypes, os, sys, time
from ftrain._native import Copier, CopyPlan, Taken
from array import array
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
parent = os.getpid()
other = os.fork()
if not other:
    while os.getppid() == parent:
        pass
    os._exit(0)
try:
    taken, began = Taken(), time.thread_time()
    while time.thread_time() - began < 0.2:
        pass
    own, ran = taken.seconds(), time.thread_time() - began
    source, target = bytearray(256 << 20), bytearray(256 << 20)
    address = lambda data: ctypes.addressof(ctypes.c_char.from_buffer(data))
    plan = CopyPlan(array("Q", [0]), array("Q", [address(source)]), array("Q", [len(source)]))
    job = Copier(1).begin(plan, address(target))
    job.wait()
    print(own, ran, job.taken_seconds())
finally:
    os.kill(other, 9)
    os.waitpid(other, 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    own, ran, copying = map(float, done.stdout.split())
    assert 0.05 < own <= ran * 1.01
    assert copying > 0

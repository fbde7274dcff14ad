"""How a worker's memory comes to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launching.harness import Cluster

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TOUCHES = """
    import os, resource, torch

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    before = faults()
    tensors = [torch.ones(1 << 18) for _ in range(32)]  # 1 MiB each: torch itself asks for huge pages from 2 MiB on
    print("pages", 32 * (1 << 20) // os.sysconf("SC_PAGESIZE"), "faults", faults() - before)
    before = faults()
    del tensors
    tensors = [torch.ones(1 << 18) for _ in range(32)]
    print("again", faults() - before, "own", os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text() or not os.confstr("CS_GNU_LIBC_VERSION"),
    reason="this kernel has no huge pages, or this C library is not glibc",
)
def test_small_tensors_of_a_worker_lie_on_huge_pages_that_are_kept(cluster: Cluster) -> None:
    launcher = cluster.launch("--nproc-per-node", 1, cluster.script(TOUCHES))
    assert launcher.wait() == 0, launcher.text
    words = launcher.text.split()
    pages, faults, again = (int(words[words.index(name) + 1]) for name in ("pages", "faults", "again"))
    assert faults < pages // 8
    assert again < faults
    assert words[words.index("own") + 1] == "None"  # it is the nursery's: what a script starts has its own

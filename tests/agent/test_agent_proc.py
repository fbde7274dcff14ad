"""What a supervisor does with its own memory."""

from __future__ import annotations

import subprocess
import sys

FREED = """
import psutil
from ftrain.agent.proc import trim_heap
blocks = [bytes(4000) for _ in range(20_000)]
last = blocks[-1]  # above all the others in the heap
del blocks
before = psutil.Process().memory_info().rss
trim_heap()
print(before - psutil.Process().memory_info().rss)
"""


def test_freed_memory_below_what_is_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], check=True, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) > 40_000_000  # of 80

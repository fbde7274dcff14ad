"""Waiting for peers in a store, without being deaf to anything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch.distributed import Store

LOOK_SECONDS = (0.001, 0.05)  # between two looks: at first, and at most


def wait_for(store: Store, keys: Sequence[str], look: Callable[[], None]) -> None:
    """Until all keys are there. `look` is called again and again, and ends the wait by raising."""
    pause, longest = LOOK_SECONDS
    while not store.check(list(keys)):  # to wait in the store would block, and warns each time that it waits in vain
        look()
        time.sleep(pause)
        pause = min(2 * pause, longest)

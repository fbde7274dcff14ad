"""Waiting for peers in a store, without being deaf to anything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from torch.distributed import Store

FIRST_SECONDS = 0.001
LONGEST_SECONDS = (0.002, 0.05)  # at the least, however few ranks ask, and at the most
ASKED_PER_SECOND_MAX = 20_000  # by all ranks together, of the one process that serves them


def wait_for(store: Store, keys: Sequence[str], look: Callable[[], None], ranks: int) -> None:
    """Until all keys are there. `look` is called again and again, and ends the wait by raising.

    As many `ranks` may be asking the same store at once.
    """
    asked = list(keys)
    for pause_seconds in _pauses(ranks):  # to wait in the store would block, and warns each time that it waits in vain
        if store.check(asked):
            return
        look()
        time.sleep(pause_seconds)


def _pauses(ranks: int) -> Iterator[float]:
    """Between two looks, in seconds: short at first. Endless."""
    least, most = LONGEST_SECONDS
    longest = min(max(ranks / ASKED_PER_SECOND_MAX, least), most)
    pause_seconds = FIRST_SECONDS
    while True:
        yield pause_seconds
        pause_seconds = min(2 * pause_seconds, longest)

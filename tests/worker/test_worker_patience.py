"""Waiting in a store: quick where few ask, bearable for the store where many do, and however long it takes."""

from __future__ import annotations

import itertools
import threading

import pytest
from torch.distributed import HashStore

from ftrain.worker import patience
from ftrain.worker.patience import ASKED_PER_SECOND_MAX, LONGEST_SECONDS, wait_for


def test_a_key_that_is_set_later_ends_the_wait() -> None:
    store = HashStore()
    threading.Timer(0.05, store.set, ("key", "value")).start()
    wait_for(store, ["key"], lambda: None, ranks=2)
    assert store.get("key") == b"value"


def test_a_look_that_raises_ends_the_wait() -> None:
    class TooLongError(Exception):
        pass

    looks = itertools.count()

    def look() -> None:
        if next(looks) == 3:
            raise TooLongError

    with pytest.raises(TooLongError):
        wait_for(HashStore(), ["never"], look, ranks=2)


@pytest.mark.parametrize("ranks", [1, 40, 500, 100_000])
def test_looks_stay_within_what_the_store_can_bear_in_a_wait_of_an_hour(ranks: int) -> None:
    """Each look of a long wait comes after the same pause, and all ranks together ask no more often than they may."""
    least, most = LONGEST_SECONDS
    pauses = list(itertools.islice(patience._pauses(ranks), int(3600 / least)))
    assert pauses[0] <= least
    assert set(pauses[10:]) == {pauses[-1]}
    assert least <= pauses[-1] <= most
    assert ranks / pauses[-1] <= ASKED_PER_SECOND_MAX or pauses[-1] == most or pauses[-1] == least

"""Shared state that goes to a newcomer ahead of its tensors: as bytes, while the newcomer still builds its model.

    newcomer   joins ──► expects ─────────────┐          builds ──► takes it over
                          (a thread receives) │
    giver      halted ──► gives ──────────────┘ ──► meets the peers

Each pair has a connection of its own for it: the newcomer's groups are connected only when its script has made them.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Collection
from datetime import timedelta

from torch.distributed import PrefixStore, ProcessGroup, Store

from ftrain.checkpoint.live_copy import Ahead, give_ahead, receive_ahead
from ftrain.checkpoint.tracked import Tracked
from ftrain.checkpoint.wire import Wire
from ftrain.errors import PeerLost
from ftrain.worker import gloo_sockets
from ftrain.worker.ordinary_group import beside, gloo_group
from ftrain.worker.patience import wait_for

TIMEOUT = timedelta(minutes=10)
EXPECTS, DECLINES = "expects", "declines"
LEAVE_SECONDS = 2.0


class Arrival:
    """What the rank `source` gives to this newcomer. A thread receives it, from now on.

    `meet` connects to the store of the generation; `look` raises when the generation is over.
    """

    def __init__(
        self, meet: Callable[[], Store], source: int, rank: int, loopback: bool, look: Callable[[], None]
    ) -> None:
        self._came: Ahead | None = None
        self._failed: Exception | None = None
        self._leaving = False

        def check() -> None:
            if self._leaving:
                raise PeerLost("this process ends")
            look()

        def run() -> None:
            try:
                store = meet()
                store.set(_key(rank), EXPECTS)
                group = _pair(store, source, rank, 1, loopback, check)
                self._came = receive_ahead(Wire(0, group))
            except Exception as error:  # noqa: BLE001  # raised by `take`, in the thread that needs it
                self._failed = error

        self._thread = threading.Thread(target=run, name="ftrain-ahead", daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def take(self) -> Ahead | None:
        """Wait for it. None where there is nothing ahead; raises what kept it from coming. To be called once."""
        self._thread.join()
        atexit.unregister(self._leave)
        if self._failed is not None:
            raise self._failed
        came, self._came = self._came, None
        return came

    def _leave(self) -> None:
        """End the thread: one that comes back from native code while Python ends would take the process down."""
        self._leaving = True
        if self._thread.is_alive():
            gloo_sockets.shut_down()
            self._thread.join(LEAVE_SECONDS)


def decline(store: Store, rank: int) -> None:
    """Say that this rank, which is to get state, has its tensors already: they are filled when all have met."""
    store.set(_key(rank), DECLINES)


def give(
    tracked: Tracked, rank: int, takers: Collection[int], store: Store, loopback: bool, look: Callable[[], None]
) -> set[int]:
    """Give the shared state to those of the takers that expect it by an `Arrival`. Returns who has it."""
    given = set()
    for taker in takers:
        wait_for(store, [_key(taker)], look)
        if store.get(_key(taker)).decode() == EXPECTS:
            group = beside(lambda taker=taker: _pair(store, rank, taker, 0, loopback, look), look)  # type: ignore[misc]
            if give_ahead(tracked, rank, Wire(1, group)):
                given.add(taker)
    return given


def _pair(store: Store, source: int, taker: int, place: int, loopback: bool, check: Callable[[], None]) -> ProcessGroup:
    name = f"ftrain/ahead/{source}-{taker}"
    return gloo_group(PrefixStore(name, store), place, 2, TIMEOUT, name, loopback, check)


def _key(taker: int) -> str:
    return f"ftrain/ahead/{taker}"

"""Persists sealed snapshots in threads of the agent, so that the training process has no part in it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.writing.persist import beside_training, persist_slot
from ftrain.checkpoint.writing.unchanged import Memory
from ftrain.core.codec import Codec
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import FtrainError
from ftrain.storage.base import Storage

log = logging.getLogger("ftrain.saver")
THREADS_MAX = 8


class Saver:
    """One for each agent. Results are delivered by `done(attempt, rank, pack or None, cause)`, from a thread.

    `bytes_per_second_max` bounds what all its ranks together write (0: no bound); with `codec` it is compressed.
    """

    def __init__(
        self,
        storage: Storage,
        ranks: int,
        done: Callable[[Attempt, int, PackRecord | None, str], None],
        bytes_per_second_max: int = 0,
        codec: Codec | None = None,
    ) -> None:
        threads = min(ranks, THREADS_MAX)
        self._storage = storage
        self._done = done
        # Each pack keeps to its share: what one does not use, since it is done already, is not given to the others.
        share = -(-bytes_per_second_max // threads)
        self._effort = beside_training(threads, share)
        # Looking for what has not changed leaves the processor to training, too.
        self._pool = ThreadPoolExecutor(threads, "ftrain-saver", self._effort.step_back)
        self._codec = codec
        self._memory = Memory()
        self._cancelled: dict[Attempt, threading.Event] = {}

    def save(self, attempt: Attempt, rank: int, arena: Arena, slot: int, base: Attempt | None = None) -> None:
        """`base` is a commit whose packs may be referred to for what has not changed since."""
        cancelled = self._cancelled.setdefault(attempt, threading.Event())
        self._pool.submit(self._save, attempt, rank, arena, slot, base, cancelled)

    def cancel(self, attempt: Attempt) -> None:
        """Give up what is being written of the attempt; each of its ranks still gets its `done`, with no cause."""
        if attempt in self._cancelled:
            self._cancelled[attempt].set()

    def forget(self, attempt: Attempt) -> None:
        self._cancelled.pop(attempt, None)

    def close(self) -> None:
        for cancelled in self._cancelled.values():
            cancelled.set()
        self._pool.shutdown(wait=True)

    def _save(
        self, attempt: Attempt, rank: int, arena: Arena, slot: int, base: Attempt | None, cancelled: threading.Event
    ) -> None:
        try:
            pack = persist_slot(
                self._storage,
                attempt,
                rank,
                arena,
                slot,
                cancelled.is_set,
                self._effort,
                self._memory,
                base,
                self._codec,
            )
        except (FtrainError, OSError) as error:
            self._done(attempt, rank, None, "" if cancelled.is_set() else str(error))
        except Exception as error:  # a thread's edge: a bug here must abort the attempt, not strand it
            log.exception("persisting %s of rank %d failed", attempt, rank)
            self._done(attempt, rank, None, f"{type(error).__name__}: {error}")
        else:
            self._done(attempt, rank, pack, "")

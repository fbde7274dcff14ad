"""How fast one writer may go, and whether it should go on at all."""

from __future__ import annotations

import time
from collections.abc import Callable

from ftrain.errors import StorageError

PACE_SECONDS = 0.05  # between two looks whether to stop


class Pace:
    """Called before each part with the bytes that went before: keeps to the rate, and stops who is told to."""

    def __init__(self, bytes_per_second_max: int, should_stop: Callable[[], bool], what: str) -> None:
        self._bytes_per_second_max = bytes_per_second_max
        self._should_stop = should_stop
        self._what = what
        self._begin = time.monotonic()

    def __call__(self, done_bytes: int) -> None:
        self.stop_if_over()
        if not self._bytes_per_second_max:
            return
        due = self._begin + done_bytes / self._bytes_per_second_max
        while (left := due - time.monotonic()) > 0:
            time.sleep(min(left, PACE_SECONDS))
            self.stop_if_over()

    def stop_if_over(self) -> None:
        """Raises `StorageError` where it is told to stop."""
        if self._should_stop():
            raise StorageError(f"writing {self._what} was stopped: its checkpoint attempt is over")

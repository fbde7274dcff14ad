"""One line in the log for each thing that was refused, and no more than one a second.

Whoever can reach the port can make us refuse things as fast as the network allows. The log gets the first of them at
once and afterwards a count a second, so a flood costs neither disk nor attention.
"""

from __future__ import annotations

import asyncio
import logging

LINE_SECONDS = 1.0
LINE_CHARS_MAX = 300

logger = logging.getLogger("ftrain.control")


class Refusals:
    """Writes refusals of one kind to the log, at most one line a second. Lives in one event loop."""

    def __init__(self) -> None:
        self._held = 0  # refusals since the last line
        self._newest = ""
        self._timer: asyncio.TimerHandle | None = None  # runs for a second after each line

    def add(self, text: str) -> None:
        """Report one refusal. What a stranger sent may be part of `text`: it is made printable and cut."""
        line = printable(text)
        if self._timer is None:
            logger.warning("%s", line)
            self._timer = asyncio.get_running_loop().call_later(LINE_SECONDS, self._tick)
        else:
            self._held += 1
            self._newest = line

    def close(self) -> None:
        """Write what is held back and stop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flush()

    def _tick(self) -> None:
        self._timer = None
        if self._flush():
            self._timer = asyncio.get_running_loop().call_later(LINE_SECONDS, self._tick)

    def _flush(self) -> bool:
        held, self._held = self._held, 0
        if held == 1:
            logger.warning("%s", self._newest)
        elif held:
            logger.warning("%s (and %d more like it within a second)", self._newest, held - 1)
        return held > 0


def printable(text: str) -> str:
    """`text` on one line, without control characters, cut to what a log line may have."""
    line = text[: LINE_CHARS_MAX + 1]
    if not line.isprintable():
        line = "".join(character if character.isprintable() else " " for character in line)
    return line if len(line) <= LINE_CHARS_MAX else line[: LINE_CHARS_MAX - 3] + "..."

"""What the run tells people: lines on the terminal while it goes on, and the same as records in `events.jsonl`."""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ftrain.core.messages import Tier
from ftrain.core.run_state import Action, Continues, Interrupted, Log, Measured, Resumed

log = logging.getLogger("ftrain")
PROGRESS_SECONDS = 2.0
RECORDS_KEPT = 100
WHERE = {
    Tier.LIVE: "from living ranks",
    Tier.ARENA: "from snapshots in memory",
    Tier.STORAGE: "from the newest commit",
}


class Story:
    """Writes beside the run, never in its way: a full disk costs the story, not the training."""

    def __init__(self, directory: Path | None) -> None:
        self._events = _Records(directory, "events.jsonl")
        self._metrics = _Records(directory, "metrics.jsonl")
        self.interruptions: deque[dict[str, Any]] = deque(maxlen=RECORDS_KEPT)
        self.recovery_seconds = 0.0  # what the last one took
        self.metrics: dict[str, float | str] = {}
        self.step = -1
        self._shown_at = 0.0

    def tell(self, action: Action) -> None:
        match action:
            case Log(text, level):
                log.log(logging.getLevelName(level.upper()), text)
                self._events.write({"event": level, "text": text})
            case Interrupted(failure, generation, furthest):
                log.warning("generation %d interrupted: %s", generation, failure.summary)
                interruption = {
                    "event": "interruption",
                    "generation": generation,
                    "class": failure.kind.value,
                    "rank": failure.rank,
                    "node": failure.node,
                    "summary": failure.summary,
                    "traceback": failure.traceback,
                    "furthest_step": furthest,
                }
                self.interruptions.append(interruption)
                self._events.write(interruption)
            case Continues(generation, step, furthest, tier, survivors, forked):
                lost = max(0, furthest - step) if furthest >= 0 else 0
                self._tell_how(step, lost, tier, survivors, forked)
                found = {
                    "resumes_at": step,
                    "redone_steps": lost,
                    "tier": tier.value if tier is not None else "",
                    "survivors": survivors,
                    "forked": forked,
                }
                if self.interruptions:
                    self.interruptions[-1].update(found)
                self._events.write({"event": "continues", "generation": generation, **found})
            case Resumed(generation, step, seconds):
                log.info(
                    "generation %d is back in its loop at step %d, %.2f s after the failure", generation, step, seconds
                )
                self.recovery_seconds = seconds
                if self.interruptions:
                    self.interruptions[-1]["recovery_seconds"] = seconds
                self._events.write({"event": "resumed", "generation": generation, "step": step, "seconds": seconds})
            case Measured(metrics):
                self.step, self.metrics = metrics.step, metrics.values
                self._metrics.write({"generation": metrics.generation, "step": metrics.step, **metrics.values})
                if time.monotonic() - self._shown_at >= PROGRESS_SECONDS:
                    self._shown_at = time.monotonic()
                    values = "  ".join(f"{name} {number(value)}" for name, value in metrics.values.items())
                    log.info("step %d  %s", metrics.step, values)
            case _:
                raise AssertionError(f"not a thing to tell: {action}")

    def _tell_how(self, step: int, lost: int, tier: Tier | None, survivors: int, forked: int) -> None:
        if tier is None:
            log.info("starting again from the beginning")
        elif survivors:
            log.info(
                "going on in place from step %d (%s; %d finished step(s) to redo): %d rank(s) keep their processes, "
                "%d forked anew",
                step,
                WHERE[tier],
                lost,
                survivors,
                forked,
            )
        else:
            log.info("starting again from step %d (%d finished step(s) to redo)", step, lost)

    def close(self) -> None:
        self._events.close()
        self._metrics.close()


def number(value: float | str) -> str:
    """A metric as people read it."""
    return value if isinstance(value, str) else f"{value:.4g}"


class _Records:
    """A file of JSON lines, or nothing where there is none to be had. Says so once, until it can be written again."""

    def __init__(self, directory: Path | None, name: str) -> None:
        self._file: BinaryIO | None = None
        self._failing = False
        if directory is not None:
            try:
                self._file = (directory / name).open("ab", buffering=0)
            except OSError as error:
                log.warning("%s cannot be written: %s", directory / name, error.strerror)

    def write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(msgspec.json.encode({"unix_seconds": round(time.time(), 3), **record}) + b"\n")
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written: %s", self._file.name, error.strerror)
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

"""A checkpoint that the node's own memory still holds, put back from there, beside a memcpy of the same bytes."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

from limits import Memory
from states import State, clear, digest

from ftrain import _native
from ftrain.checkpoint.garbage import no_collection
from ftrain.checkpoint.publish import publish
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.snapshot import Snapshotter
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.state.items import items_of
from ftrain.checkpoint.writing.persist import persist_slot
from ftrain.core.manifest import decode_index
from ftrain.core.messages import Attempt
from ftrain.storage import open_storage

ATTEMPT = Attempt(1, 1, 1)


def restore(path: Path, state: State, check: bool) -> dict[str, Any]:
    """Seconds of a restore from an arena of this process, and of a memcpy of as many bytes out of that arena.

    The checkpoint is taken, persisted and committed before, and opened anew. The second of two restores is measured,
    between two memcpys, of which the mean counts. `check` compares what was restored with what was saved.
    """
    storage, fd = open_storage(str(path)), _native.memory_file("bench-arena")
    arena = Arena(fd)
    try:
        items = items_of(list(state), list(state.values()))
        snapshotter = Snapshotter(arena, 0, 1, lambda own: [own], 0)
        snapshotter.plan(items)
        snapshotter.take(0, ATTEMPT, items, {})()
        publish(storage, ATTEMPT, 1, [persist_slot(storage, ATTEMPT, 0, arena, 0, lambda: False)], "bench")
        before = digest(state) if check else 0
        image = arena.image(0)
        index = decode_index(arena.read_index(0), "the arena", sealed=True)
        size = sum(tensor.nbytes for tensor in state.values())
        target = Memory(size)

        def copy() -> float:
            began = time.perf_counter()
            ctypes.memmove(target.address, image.address, size)
            return time.perf_counter() - began

        def put_back() -> float:
            checkpoint = Checkpoint.open(storage, ATTEMPT.path)
            if not checkpoint.hold(0, index, image):
                raise ValueError("the arena holds another checkpoint than was saved")
            began = time.perf_counter()
            with no_collection():
                checkpoint.read_into(items, 0)
            return time.perf_counter() - began

        copy()
        put_back()
        clear(state)
        first, seconds, second = copy(), put_back(), copy()
        if check and digest(state) != before:
            raise ValueError("what came back from the arena is not what was saved")
        return {"seconds": seconds, "memcpy": (first + second) / 2}
    finally:
        arena.close()
        os.close(fd)

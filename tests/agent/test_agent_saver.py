"""The saver: what becomes of a sealed snapshot, and the rate that all ranks of an agent keep together."""

from __future__ import annotations

import queue
import time
from pathlib import Path

import pytest
import torch

from ftrain.agent.saver import Saver
from ftrain.checkpoint.state.items import item_of
from ftrain.core.layout import CHUNK_BYTES_MAX
from ftrain.core.messages import Attempt, PackRecord
from ftrain.storage import PosixStorage
from tests.checkpoint.world import World

ATTEMPT = Attempt(1, 10, 1)
CHUNKS = 3
BYTES_PER_SECOND_MAX = 16 * CHUNK_BYTES_MAX

Answers = queue.SimpleQueue[tuple[Attempt, int, PackRecord | None, str]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_together_keep_to_the_rate(tmp_path: Path, ranks: int) -> None:
    answers: Answers = queue.SimpleQueue()
    saver = Saver(PosixStorage(tmp_path), ranks, lambda *answer: answers.put(answer), BYTES_PER_SECOND_MAX)
    with World(ranks) as world:
        world.plan(lambda rank: [item_of(f"w{rank}", torch.ones(CHUNKS * CHUNK_BYTES_MAX // 4))])
        world.take(ATTEMPT, lambda rank: [item_of(f"w{rank}", torch.ones(CHUNKS * CHUNK_BYTES_MAX // 4))])
        began = time.monotonic()
        for rank, arena in enumerate(world.arenas):
            saver.save(ATTEMPT, rank, arena, 0)
        found = [answers.get(timeout=60) for _ in range(ranks)]
        seconds = time.monotonic() - began
        saver.close()
    assert sorted(rank for _, rank, _, _ in found) == list(range(ranks))
    assert all(pack is not None and not cause for _, _, pack, cause in found), found
    # A rank's last chunk was not due before. When it came after that is up to the disk.
    assert seconds >= ranks * (CHUNKS - 1) * CHUNK_BYTES_MAX / BYTES_PER_SECOND_MAX


def test_a_cancelled_attempt_is_answered_without_a_cause(tmp_path: Path) -> None:
    answers: Answers = queue.SimpleQueue()
    saver = Saver(PosixStorage(tmp_path), 1, lambda *answer: answers.put(answer), bytes_per_second_max=1)
    with World(1) as world:
        world.plan(lambda _: [item_of("w", torch.ones(CHUNKS * CHUNK_BYTES_MAX // 4))])
        world.take(ATTEMPT, lambda _: [item_of("w", torch.ones(CHUNKS * CHUNK_BYTES_MAX // 4))])
        saver.save(ATTEMPT, 0, world.arenas[0], 0)  # at a byte a second it takes longer than anybody waits
        saver.cancel(ATTEMPT)
        assert answers.get(timeout=60) == (ATTEMPT, 0, None, "")
        saver.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "zarr.json"]

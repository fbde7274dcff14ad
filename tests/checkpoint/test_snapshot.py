from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ftrain.checkpoint.publish import publish
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.state.items import TensorItem, item_of
from ftrain.checkpoint.writing.persist import persist_slot
from ftrain.core.layout import Mesh
from ftrain.core.messages import Attempt
from ftrain.errors import CorruptCheckpoint, MismatchedState, NotPlainData, OutOfMemory, ProtocolError, StorageError
from ftrain.storage import PosixStorage
from tests.checkpoint.world import World, line, sharded

FIRST, SECOND = Attempt(1, 10, 1), Attempt(1, 20, 2)


def weights(value: float) -> list[TensorItem]:
    return [item_of("w", torch.full((1000,), float(value))), item_of("b", torch.full((3,), float(value)))]


def test_two_snapshots_are_kept_at_a_time(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    with World(2) as world:
        world.plan(lambda _: weights(0))
        world.take(FIRST, lambda _: weights(1), slot=0)
        world.take(SECOND, lambda _: weights(2), slot=1)
        for attempt, slot in ((FIRST, 0), (SECOND, 1)):
            publish(storage, attempt, 2, world.persist(storage, attempt, slot), "test")
    for attempt, value in ((FIRST, 1), (SECOND, 2)):
        target = weights(0)
        Checkpoint.open(storage, attempt.path).read_into(target, 0)
        assert target[0].local.unique().tolist() == [value]


def halves(value: float) -> Callable[[int], list[TensorItem]]:
    return lambda rank: [sharded("w", torch.full((400_000,), value), Mesh((2,), (0, 1)), ("S0",), rank)]


def test_third_slot_is_for_what_one_rank_alone_holds(tmp_path: Path) -> None:
    with World(2, slots=3) as world:
        world.plan(lambda _: weights(0))
        assert [one.slots for one in world.snapshotters] == [2, 2]
    storage = PosixStorage(tmp_path)
    with World(2, slots=3) as world:
        world.plan(halves(0.0))
        assert [one.slots for one in world.snapshotters] == [3, 3]
        attempts = [Attempt(1, 10 * number, number) for number in (1, 2, 3)]
        for slot, attempt in enumerate(attempts):
            world.take(attempt, halves(float(slot)), slot=slot)
        for slot, attempt in enumerate(attempts):
            publish(storage, attempt, 2, world.persist(storage, attempt, slot), "test")
    for value, attempt in enumerate(attempts):
        target = halves(7.0)(1)
        Checkpoint.open(storage, attempt.path).read_into(target, 1)
        assert target[0].local.unique().tolist() == [value]


def test_without_memory_for_a_third_slot_there_are_two(caplog: pytest.LogCaptureFixture) -> None:
    with World(2, bytes_max=3 << 20, slots=3) as world:
        world.plan(halves(0.0))
        assert [one.slots for one in world.snapshotters] == [2, 2]
        world.take(FIRST, halves(1.0), slot=1)
    assert "snapshots in memory are less frequent than they could be" in caplog.text


def test_private_tensors_and_plain_data_may_grow_beyond_what_was_reserved(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    with World(1) as world:
        world.plan(lambda _: [*weights(0), item_of("cache", torch.zeros(10), private=True)])
        world.take(FIRST, lambda _: weights(1), slot=1)
        grown = [*weights(2), item_of("cache", torch.ones(3 << 20), private=True), item_of("new", torch.ones(1), True)]
        world.take(SECOND, lambda _: grown, lambda _: {"seen": list(range(200_000))}, slot=0)
        for attempt, slot in ((FIRST, 1), (SECOND, 0)):
            publish(storage, attempt, 1, world.persist(storage, attempt, slot), "test")
    checkpoint = Checkpoint.open(storage, SECOND.path)
    assert checkpoint.plain(0)["seen"] == list(range(200_000))
    target = [*weights(0), item_of("cache", torch.zeros(3 << 20), private=True)]
    checkpoint.read_into(target, 0)
    assert target[2].local.min() == 1
    assert Checkpoint.open(storage, FIRST.path).private_keys(0) == []


def test_what_an_earlier_snapshot_left_in_the_slot_is_not_persisted(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    with World(1) as world:
        world.plan(lambda _: [])
        secret = item_of("s", torch.full((50_000,), 7, dtype=torch.uint8), private=True)
        world.take(FIRST, lambda _: [secret])
        world.take(SECOND, lambda _: [item_of("t", torch.zeros(10, dtype=torch.uint8), private=True)])
        pack = world.persist(storage, SECOND)[0]
    assert 7 not in storage.read(f"{SECOND.path}/{pack.path}/c/0")[: pack.file_bytes - 20]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda items: items[:1], "b is gone"),
        (lambda items: [*items, item_of("c", torch.zeros(1))], "c is new"),
        (lambda items: [items[0], item_of("b", torch.zeros(4))], r"b was float32\[3\] and is float32\[4\]"),
        (lambda items: [items[0], item_of("b", torch.zeros(3).double())], r"b was float32\[3\] and is float64\[3\]"),
        (lambda items: [*items, items[0]], "w: two tensors"),
    ],
)
def test_shared_tensors_that_changed_since_the_plan_are_refused(change: object, problem: str, tmp_path: Path) -> None:
    with World(1) as world:
        world.plan(lambda _: weights(0))
        world.take(FIRST, lambda _: weights(1))
        with pytest.raises(MismatchedState, match=problem):
            world.take(SECOND, lambda _: change(weights(2)))  # type: ignore[operator]
        # The slot still holds the first: nothing was touched.
        persist_slot(PosixStorage(tmp_path), FIRST, 0, world.arenas[0], 0, lambda: False)


def test_after_a_new_plan_the_new_tensors_are_taken(tmp_path: Path) -> None:
    with World(2) as world:
        world.plan(lambda _: weights(0))
        world.plan(lambda _: [*weights(0), item_of("c", torch.zeros(5))])
        world.take(FIRST, lambda _: [*weights(1), item_of("c", torch.ones(5))])
        packs = world.persist(PosixStorage(tmp_path), FIRST)
    assert sum(pack.tensors for pack in packs) == 3


def test_plain_data_that_is_not_plain_leaves_the_slot_alone(tmp_path: Path) -> None:
    with World(1) as world:
        world.plan(lambda _: weights(0))
        with pytest.raises(NotPlainData, match=r"sampler\.seen"):
            world.take(FIRST, lambda _: weights(1), lambda _: {"sampler": {"seen": {1, 2}}})
        with pytest.raises(CorruptCheckpoint, match="no sealed snapshot"):
            persist_slot(PosixStorage(tmp_path), FIRST, 0, world.arenas[0], 0, lambda: False)


def test_ranks_that_disagree_are_told_on_every_rank() -> None:
    with World(3) as world, pytest.raises(MismatchedState, match="w: rank 0 has it as"):
        world.plan(lambda rank: [item_of("w", torch.zeros(2 + rank // 2))])


def test_ranks_with_other_specs_find_the_same_plan(tmp_path: Path) -> None:
    with World(3) as world:
        world.plan(lambda rank: [item_of("w", torch.zeros(9)), item_of(f"own{rank}", torch.zeros(1))])
        world.take(FIRST, lambda rank: [item_of("w", torch.zeros(9)), item_of(f"own{rank}", torch.zeros(1))])
        packs = world.persist(PosixStorage(tmp_path), FIRST)
    assert sum(pack.tensors for pack in packs) == 4


def test_the_bound_on_the_arena_is_kept() -> None:
    with World(1, bytes_max=1 << 20) as world, pytest.raises(OutOfMemory, match="bound of 1048576"):
        world.plan(lambda _: [item_of("w", torch.zeros(1 << 20))])


def test_a_snapshot_before_the_plan_is_refused() -> None:
    with World(1) as world, pytest.raises(ProtocolError):
        world.take(FIRST, lambda _: weights(1))


def test_a_slot_with_another_attempt_is_not_persisted(tmp_path: Path) -> None:
    with World(1) as world:
        world.plan(lambda _: weights(0))
        world.take(FIRST, lambda _: weights(1))
        with pytest.raises(CorruptCheckpoint, match=r"is of rank 0, step 10 .* instead of step 20"):
            persist_slot(PosixStorage(tmp_path), SECOND, 0, world.arenas[0], 0, lambda: False)


def test_persisting_stops_when_it_is_told_to(tmp_path: Path) -> None:
    with World(1) as world:
        world.plan(lambda _: weights(0))
        world.take(FIRST, lambda _: weights(1))
        with pytest.raises(StorageError, match="stopped"):
            persist_slot(PosixStorage(tmp_path), FIRST, 0, world.arenas[0], 0, lambda: True)
        assert not PosixStorage(tmp_path).exists(f"{FIRST.path}/packs/00000/c/0")


def test_bytes_are_shared_out_among_replicas(tmp_path: Path) -> None:
    with World(4) as world:
        world.plan(lambda _: [item_of(f"w{n}", torch.zeros(1000)) for n in range(8)])
        world.take(FIRST, lambda _: [item_of(f"w{n}", torch.zeros(1000)) for n in range(8)])
        packs = world.persist(PosixStorage(tmp_path), FIRST)
    assert [pack.payload_bytes for pack in packs] == [8000] * 4


def test_shards_stay_with_their_ranks(tmp_path: Path) -> None:
    tensor = torch.randn(8, 4)
    with World(4) as world:
        world.plan(lambda rank: [sharded("w", tensor, line(4), ("S0",), rank)])
        world.take(FIRST, lambda rank: [sharded("w", tensor, line(4), ("S0",), rank)])
        packs = world.persist(PosixStorage(tmp_path), FIRST)
    assert [pack.payload_bytes for pack in packs] == [32] * 4

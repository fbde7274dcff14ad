"""The whole way with real arenas and files: snapshot, persist, publish, restore."""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftrain.checkpoint.publish import publish
from ftrain.checkpoint.reading import restore
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.state.items import TensorItem, item_of
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.core.layout import ITEM_BYTES, Mesh, TensorSpec
from ftrain.core.manifest import decode_index
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import CheckpointNotFound, CorruptCheckpoint, MismatchedState, StorageError
from ftrain.storage import PosixStorage
from tests.checkpoint.world import World, bits, line, load, save, sharded

ATTEMPT = Attempt(1, 10, 1)
Items = Callable[[int], list[TensorItem]]


@pytest.fixture
def storage(tmp_path: Path) -> PosixStorage:
    return PosixStorage(tmp_path)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory whose syncs cost nothing, for tests of many small checkpoints."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ftrain-test-") as path:
        yield Path(path)


def placed(tensors: dict[str, tuple[torch.Tensor, tuple[str, ...]]], mesh: Mesh) -> Items:
    """Each tensor with its placements on the mesh; "R" alone for those that are the same everywhere."""

    def items(rank: int) -> list[TensorItem]:
        return [sharded(key, tensor, mesh, placements, rank) for key, (tensor, placements) in tensors.items()]

    return items


def check_equal_on(storage: PosixStorage, size: int, items: Items) -> None:
    """What is loaded on `size` ranks is what `items` has there, bit for bit."""
    checkpoint = Checkpoint.open(storage, ATTEMPT.path)
    for rank in range(size):
        expected, loaded = items(rank), items(rank)
        for item in loaded:
            item.local.view(torch.uint8 if item.local.dim() else item.local.dtype).zero_()
        checkpoint.read_into(loaded, rank)
        for before, after in zip(expected, loaded, strict=True):
            assert bits(after.local) == bits(before.local), (before.spec.key, rank)


def random_tensor(dtype: str, shape: Sequence[int]) -> torch.Tensor:
    nbytes = prod(shape) * ITEM_BYTES[dtype]
    if dtype == "bool":
        return torch.rand(tuple(shape)) < 0.5
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8).view(getattr(torch, dtype)).reshape(tuple(shape))


@pytest.mark.parametrize("loaded_on", [1, 2, 3, 4, 7])
def test_a_state_saved_on_four_ranks_is_loaded_on_any_number(storage: PosixStorage, loaded_on: int) -> None:
    tensors = {
        "rows": (torch.randn(10, 7), ("S0",)),
        "columns": (torch.randn(6, 8), ("S1",)),
        "uneven": (torch.randn(5, 7, 3), ("S1",)),
        "tiny": (torch.randn(2, 3), ("S0",)),
        "empty": (torch.randn(0, 3), ("S0",)),
        "scalar": (torch.tensor(2.5), ("R",)),
        "same": (torch.randn(100), ("R",)),
        "large": (torch.randn(3000, 800), ("S0",)),
    }
    save(storage, ATTEMPT, 4, placed(tensors, line(4)))
    check_equal_on(storage, loaded_on, placed(tensors, line(loaded_on)))


def test_rows_become_columns_and_a_mesh_of_two_dimensions(storage: PosixStorage) -> None:
    tensor = torch.randn(300, 500)
    save(storage, ATTEMPT, 3, placed({"w": (tensor, ("S0",))}, line(3)))
    check_equal_on(storage, 4, placed({"w": (tensor, ("S1",))}, line(4)))
    check_equal_on(storage, 4, placed({"w": (tensor, ("S1", "S0"))}, Mesh((2, 2), (3, 1, 0, 2))))


def test_pieces_smaller_than_a_chunk_are_read_through_bounded_memory(
    storage: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(1500, 2000)  # 12 MB: three chunks
    save(storage, ATTEMPT, 1, placed({"w": (tensor, ("S0",))}, line(1)))
    real = restore.split
    monkeypatch.setattr(restore, "split", lambda piece: real(piece, 100_000))
    monkeypatch.setattr(restore, "BUFFER_BYTES", 250_000)
    check_equal_on(storage, 2, placed({"w": (tensor, ("S1",))}, line(2)))
    check_equal_on(storage, 1, placed({"w": (tensor, ("S0",))}, line(1)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape_and_placement_comes_back_on_any_other(in_memory: Path, data: st.DataObject) -> None:
    storage = PosixStorage(in_memory / uuid.uuid4().hex)
    saved_on, loaded_on = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    saved, loaded = {}, {}
    for number in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
        dtype = data.draw(st.sampled_from(sorted(set(ITEM_BYTES) - {"complex32"})))
        tensor = random_tensor(dtype, shape)
        choices = st.sampled_from(["R", *(f"S{dim}" for dim in range(len(shape)))])
        saved[f"t{number}"] = (tensor, (data.draw(choices),))
        loaded[f"t{number}"] = (tensor, (data.draw(choices),))
    save(storage, ATTEMPT, saved_on, placed(saved, line(saved_on)))
    check_equal_on(storage, loaded_on, placed(loaded, line(loaded_on)))


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_comes_back_bit_for_bit_also_nan(storage: PosixStorage, dtype: str) -> None:
    tensors = {"t": (random_tensor(dtype, (4, 5)), ("S0",)), "scalar": (random_tensor(dtype, ()), ("R",))}
    save(storage, ATTEMPT, 2, placed(tensors, line(2)))
    check_equal_on(storage, 2, placed(tensors, line(2)))


def test_tensors_that_are_not_contiguous_are_saved_and_filled_in_place(storage: PosixStorage) -> None:
    values = torch.randn(40, 30)
    conjugate = torch.randn(8, dtype=torch.complex64).conj()
    save(
        storage,
        ATTEMPT,
        1,
        lambda _: [
            item_of("transposed", values.t()),
            item_of("strided", values[::2, ::3]),
            item_of("expanded", torch.tensor([1.0, 2.0]).expand(3, 2)),
            item_of("conjugate", conjugate),
        ],
    )
    memory = torch.zeros(40, 30)
    targets = [
        item_of("transposed", memory.t()),
        item_of("strided", torch.zeros(40, 30)[::2, ::3]),
        item_of("expanded", torch.zeros(3, 2)),
        item_of("conjugate", torch.zeros(8, dtype=torch.complex64)),
    ]
    Checkpoint.open(storage, ATTEMPT.path).read_into(targets, 0)
    assert torch.equal(memory, values)
    assert torch.equal(targets[1].local, values[::2, ::3])
    assert torch.equal(targets[2].local, torch.tensor([[1.0, 2.0]] * 3))
    assert torch.equal(targets[3].local, conjugate.resolve_conj())


def test_a_parameter_that_wants_gradients_is_saved_and_filled(storage: PosixStorage) -> None:
    parameter = torch.nn.Parameter(torch.randn(5))
    save(storage, ATTEMPT, 1, lambda _: [item_of("p", parameter)])
    other = torch.nn.Parameter(torch.zeros(5))
    Checkpoint.open(storage, ATTEMPT.path).read_into([item_of("p", other)], 0)
    assert torch.equal(other, parameter)


def own(rank: int) -> list[TensorItem]:
    return [item_of("rng", torch.full((rank + 1,), rank, dtype=torch.uint8), private=True)]


def test_private_tensors_and_plain_data_are_each_ranks_own(storage: PosixStorage) -> None:
    shared = torch.randn(3)
    save(
        storage,
        ATTEMPT,
        3,
        lambda rank: [item_of("w", shared), item_of("rng", torch.randn(2)), *own(rank)],
        lambda rank: {"data": {"position": (rank, 2**70)}, "step": 10},
    )
    checkpoint = Checkpoint.open(storage, ATTEMPT.path)
    assert checkpoint.world_size == 3
    assert checkpoint.tensors == {
        "w": TensorInfo("float32", (3,), private=False),
        "rng": TensorInfo("float32", (2,), private=False),
    }
    for rank in range(3):
        assert checkpoint.plain(rank) == {"data": {"position": (rank, 2**70)}, "step": 10}
        assert checkpoint.private_tensors(rank) == {"rng": TensorInfo("uint8", (rank + 1,), private=True)}
        items = own(rank)
        items[0].local.fill_(9)
        checkpoint.read_into(items, rank, elsewhere=["w", "rng"])
        assert items[0].local.tolist() == [rank] * (rank + 1)
    assert checkpoint.private_keys(3) == []
    with pytest.raises(MismatchedState, match="not in the checkpoint: rng"):
        checkpoint.read_into(own(3), 3, elsewhere=["w", "rng"])


def test_ranks_that_hold_different_tensors_make_one_checkpoint(storage: PosixStorage) -> None:
    stages = [torch.randn(4), torch.randn(6)]

    def items(rank: int) -> list[TensorItem]:
        return [item_of(f"stage{rank}", stages[rank])]

    save(storage, ATTEMPT, 2, items)
    checkpoint = Checkpoint.open(storage, ATTEMPT.path)
    target = [item_of("stage1", torch.zeros(6))]
    with pytest.raises(MismatchedState, match="only in the checkpoint: stage0"):
        checkpoint.read_into(target, 0)
    checkpoint.read_into(target, 0, elsewhere=["stage0"])
    assert torch.equal(target[0].local, stages[1])


def test_another_model_is_refused_with_its_keys_and_nothing_is_read(storage: PosixStorage) -> None:
    save(storage, ATTEMPT, 1, lambda _: [item_of(f"layer{n}", torch.ones(2)) for n in range(8)])
    checkpoint = Checkpoint.open(storage, ATTEMPT.path)
    targets = [
        item_of("layer0", torch.zeros(3)),
        item_of("layer1", torch.zeros(2, dtype=torch.float64)),
        item_of("layer2", torch.zeros(2)),
        item_of("head", torch.zeros(2)),
    ]
    with pytest.raises(MismatchedState) as caught:
        checkpoint.read_into(targets, 0)
    assert str(caught.value).endswith(
        "is of another model or optimizer: not in the checkpoint: head; "
        "only in the checkpoint: layer3, layer4, layer5, layer6, layer7; "
        "different: layer0 (float32[2] saved, float32[3] here), layer1 (float32[2] saved, float64[2] here)"
    )
    assert targets[2].local.sum() == 0


def state(rank: int) -> list[TensorItem]:
    torch.manual_seed(1)
    return placed({"a": (torch.randn(64, 1000), ("S0",)), "b": (torch.randn(30), ("R",))}, line(2))(rank)


@pytest.mark.parametrize("loaded_on", [2, 3])
def test_a_changed_byte_names_tensor_rank_file_and_offset(storage: PosixStorage, loaded_on: int) -> None:
    save(storage, ATTEMPT, 2, state)
    file = Path(storage.url, ATTEMPT.path, "packs/00001/c/0")
    data = bytearray(file.read_bytes())
    data[70_000] ^= 1
    file.write_bytes(data)
    checkpoint = Checkpoint.open(storage, ATTEMPT.path)
    items = placed({"a": (torch.zeros(64, 1000), ("S0",)), "b": (torch.zeros(30), ("R",))}, line(loaded_on))
    with pytest.raises(
        CorruptCheckpoint, match=r"packs/00001/c/0: the \d+ bytes at offset 0 .*tensor a, saved by rank 1"
    ):
        load(checkpoint, loaded_on, items)


def test_a_changed_byte_in_padding_harms_nobody(storage: PosixStorage) -> None:
    save(storage, ATTEMPT, 1, lambda _: [item_of("a", torch.ones(3))])
    file = Path(storage.url, ATTEMPT.path, "packs/00000/c/0")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    target = [item_of("a", torch.zeros(3))]
    Checkpoint.open(storage, ATTEMPT.path).read_into(target, 0)
    assert target[0].local.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("manifest.json", "manifest"),
        ("packs/00001.index.json", "sha256"),
        ("packs/00000/c/0", "bytes instead of"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_or_missing_file_is_refused_when_it_is_opened(
    storage: PosixStorage, name: str, problem: str, damage: str
) -> None:
    digest = save(storage, ATTEMPT, 2, state)
    file = Path(storage.url, ATTEMPT.path, name)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: -1000 if name.endswith("0") else -2])
    else:
        file.unlink()
    if damage == "gone" and name == "manifest.json":
        # Without the journal's word nobody knows that there ever was one.
        with pytest.raises(CheckpointNotFound, match=ATTEMPT.path):
            Checkpoint.open(storage, ATTEMPT.path)
    with pytest.raises(CorruptCheckpoint, match=problem if damage == "cut" else "is gone"):
        Checkpoint.open(storage, ATTEMPT.path, digest)


def test_another_manifest_than_the_committed_one_is_refused(storage: PosixStorage) -> None:
    digest = save(storage, ATTEMPT, 2, state)
    assert Checkpoint.open(storage, ATTEMPT.path, digest).manifest.attempt == ATTEMPT
    with pytest.raises(CorruptCheckpoint, match="not the one that was committed"):
        Checkpoint.open(storage, ATTEMPT.path, "0" * 64)


# ------------------------------------------------------------------------------------------------------------- publish


def prepared(storage: PosixStorage) -> list[PackRecord]:
    with World(2) as world:
        world.plan(state)
        world.take(ATTEMPT, state)
        return world.persist(storage, ATTEMPT)


def test_publishing_again_after_a_lost_reply_finds_its_own_work(storage: PosixStorage) -> None:
    packs = prepared(storage)
    first = publish(storage, ATTEMPT, 2, packs, "me")
    assert publish(storage, ATTEMPT, 2, packs[::-1], "me") == first
    assert hashlib.sha256(storage.read(f"{ATTEMPT.path}/manifest.json")).hexdigest() == first


def test_a_second_publisher_is_refused(storage: PosixStorage) -> None:
    packs = prepared(storage)
    publish(storage, ATTEMPT, 2, packs, "me")
    with pytest.raises(StorageError, match="another coordinator"):
        publish(storage, ATTEMPT, 2, packs, "somebody else")


def test_packs_that_are_not_all_there_are_not_published(storage: PosixStorage) -> None:
    packs = prepared(storage)
    with pytest.raises(CorruptCheckpoint, match="one for each of 2 ranks"):
        publish(storage, ATTEMPT, 2, packs[:1], "me")
    with pytest.raises(CorruptCheckpoint, match="one for each of 2 ranks"):
        publish(storage, ATTEMPT, 2, [packs[0], packs[0]], "me")
    assert not storage.exists(f"{ATTEMPT.path}/manifest.json")


def test_a_pack_that_is_not_what_was_prepared_is_not_published(storage: PosixStorage) -> None:
    packs = prepared(storage)
    file = Path(storage.url, ATTEMPT.path, "packs/00000.index.json")
    body = json.loads(file.read_bytes())
    body["box_crc32c"][0] ^= 1
    file.write_text(json.dumps(body))
    with pytest.raises(CorruptCheckpoint, match=r"packs/00000\.index\.json.*rank 0.*sha256"):
        publish(storage, ATTEMPT, 2, packs, "me")
    assert not storage.exists(f"{ATTEMPT.path}/manifest.json")


def test_packs_that_do_not_cover_a_tensor_are_not_published(storage: PosixStorage) -> None:
    """Two ranks that each believe the other writes it: a bug that must not become a checkpoint."""
    spec = TensorSpec("w", "float32", (4,), line(2), ("S0",))
    with World(2) as world:
        world.plan(lambda _: [TensorItem(spec, torch.ones(2))])
        world.snapshotters[1]._written = ()
        world.take(ATTEMPT, lambda _: [TensorItem(spec, torch.ones(2))])
        packs = world.persist(storage, ATTEMPT)
    with pytest.raises(CorruptCheckpoint, match="w is not covered exactly once: 2 of 4"):
        publish(storage, ATTEMPT, 2, packs, "me")


def test_what_the_arena_still_holds_is_restored_from_there_and_the_rest_from_storage(storage: PosixStorage) -> None:
    tensors = {"w": (torch.randn(300, 100), ("S0",)), "r": (torch.randn(5000), ("R",)), "e": (torch.ones(0, 3), ("R",))}
    with World(2) as world:
        world.plan(placed(tensors, line(2)))
        world.take(ATTEMPT, placed(tensors, line(2)))
        publish(storage, ATTEMPT, 2, world.persist(storage, ATTEMPT), "me")
        arena = world.arenas[0]
        sealed = decode_index(arena.read_index(0), "slot", sealed=True)
        pack = Path(storage.url, ATTEMPT.path, "packs/00000/c/0")
        whole = pack.read_bytes()
        pack.write_bytes(bytes(len(whole)))  # so that it shows where the bytes came from

        def opened() -> Checkpoint:
            checkpoint = Checkpoint.open(storage, ATTEMPT.path)
            assert checkpoint.hold(0, sealed, arena.image(0))
            assert not checkpoint.hold(1, sealed, arena.image(0))
            return checkpoint

        for size, placements in ((2, "S0"), (1, "S0"), (3, "S1")):
            into = placed({"w": (tensors["w"][0], (placements,)), **{key: tensors[key] for key in "re"}}, line(size))
            for rank in range(size):
                wanted, items = into(rank), into(rank)
                for item in items:
                    item.local.zero_()
                opened().read_into(items, rank)
                assert [bits(item.local) for item in items] == [bits(item.local) for item in wanted]
        first = sealed.boxes[0]
        arena.view(0, first.offset, 1)[0] ^= 1  # damaged in memory: storage is asked
        pack.write_bytes(whole)
        items = placed(tensors, line(2))(0)
        wanted = [bits(item.local) for item in items]
        for item in items:
            item.local.zero_()
        opened().read_into(items, 0)
        assert [bits(item.local) for item in items] == wanted
        pack.write_bytes(bytes(len(whole)))
        with pytest.raises(CorruptCheckpoint, match=f"tensor {first.key}, saved by rank 0"):
            opened().read_into(items, 0)

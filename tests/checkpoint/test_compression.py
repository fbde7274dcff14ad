"""Compressed checkpoints: what was saved comes back from them, by ftrain and by plain zarr, and nothing else does."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ftrain
from ftrain import _native
from ftrain.checkpoint.catalogue import find
from ftrain.checkpoint.compression import decode, encode
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.state.items import TensorItem, item_of
from ftrain.checkpoint.tools.verify import verify
from ftrain.checkpoint.writing.persist import persist_slot
from ftrain.core import frames
from ftrain.core.codec import LEVELS, Codec
from ftrain.core.layout import ITEM_BYTES
from ftrain.core.manifest import decode_index, decode_manifest
from ftrain.core.messages import Attempt
from ftrain.errors import CorruptCheckpoint, StorageError, UsageError
from ftrain.storage import PosixStorage
from ftrain.storage.zarr_view import references
from tests.attacks import hostile
from tests.checkpoint.test_save_and_load import check_equal_on, placed, random_tensor
from tests.checkpoint.test_unchanged import KEYS, Run
from tests.checkpoint.test_zarr_view import read_elsewhere, sha256
from tests.checkpoint.world import World, line, load, save

ATTEMPT = Attempt(1, 10, 1)
CODECS = [Codec.parse(name) for name in LEVELS]
BLOSC = Codec.parse("blosc-zstd")


@pytest.fixture
def storage(tmp_path: Path) -> PosixStorage:
    return PosixStorage(tmp_path)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ftrain-test-") as path:
        yield Path(path)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of a few elements, so that small tensors have many."""
    monkeypatch.setattr(frames, "FRAME_BYTES_MAX", 64)
    monkeypatch.setattr(frames, "PLAIN_BYTES_MAX", 16)  # of a scalar


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_comes_back_bit_for_bit(storage: PosixStorage, codec: Codec, dtype: str) -> None:
    tensor = random_tensor(dtype, (5003,))
    items = placed({"t": (tensor, ("S0",))}, line(2))
    save(storage, ATTEMPT, 2, items, codec=codec)
    check_equal_on(storage, 2, items)
    check_equal_on(storage, 3, placed({"t": (tensor, ("S0",))}, line(3)))
    assert decode_index(storage.read(f"{ATTEMPT.path}/packs/00000.index.json"), "").codec == str(codec)


@pytest.mark.parametrize("loaded_on", [1, 2, 3, 7])
def test_a_state_compressed_on_four_ranks_is_loaded_on_any_number(storage: PosixStorage, loaded_on: int) -> None:
    tensors = {
        "rows": (torch.randn(1000, 7), ("S0",)),
        "columns": (torch.randn(60, 81), ("S1",)),
        "uneven": (torch.randn(5, 70, 30), ("S1",)),
        "tiny": (torch.randn(2, 3), ("S0",)),
        "empty": (torch.randn(0, 3), ("S0",)),
        "scalar": (torch.tensor(2.5), ("R",)),
        "same": (torch.randn(10_000), ("R",)),
        "large": (torch.randn(3001, 800), ("S0",)),
        "wide": (torch.randn(2, 1_500_000).bfloat16(), ("S1",)),
    }
    save(storage, ATTEMPT, 4, placed(tensors, line(4)), codec=BLOSC)
    check_equal_on(storage, loaded_on, placed(tensors, line(loaded_on)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape_and_placement_comes_back_on_any_other(tiny: None, in_memory: Path, data: st.DataObject) -> None:
    storage = PosixStorage(in_memory / uuid.uuid4().hex)
    saved_on, loaded_on = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    saved, loaded = {}, {}
    for number in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(0, 20), max_size=3))
        tensor = random_tensor(data.draw(st.sampled_from(sorted(set(ITEM_BYTES) - {"complex32"}))), shape)
        choices = st.sampled_from(["R", *(f"S{dim}" for dim in range(len(shape)))])
        saved[f"t{number}"] = (tensor, (data.draw(choices),))
        loaded[f"t{number}"] = (tensor, (data.draw(choices),))
    save(storage, ATTEMPT, saved_on, placed(saved, line(saved_on)), codec=data.draw(st.sampled_from(CODECS)))
    check_equal_on(storage, loaded_on, placed(loaded, line(loaded_on)))
    verify(find(str(in_memory / Path(storage.url).name / ATTEMPT.path)))


def test_private_tensors_and_noncontiguous_targets_are_filled(storage: PosixStorage) -> None:
    def items(rank: int, fill: float | None = None) -> list[TensorItem]:
        own = torch.arange(3000.0) + rank if fill is None else torch.full((3000,), fill)
        shared = torch.arange(6000.0).reshape(60, 100) if fill is None else torch.full((100, 60), fill).t()
        return [item_of("shared", shared), item_of("own", own, private=True)]

    save(storage, ATTEMPT, 2, items, codec=BLOSC)
    checkpoint = Checkpoint.open(storage, ATTEMPT.path)
    for rank in range(2):
        loaded = items(rank, -1.0)
        checkpoint.read_into(loaded, rank)
        for before, after in zip(items(rank), loaded, strict=True):
            assert torch.equal(before.local, after.local)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_plain_zarr_reads_every_compressed_tensor(storage: PosixStorage, tmp_path: Path, codec: Codec) -> None:
    tensors = {
        "rows": (torch.randn(800, 5), ("S0",)),
        "rows.uneven": (torch.randn(1001, 5), ("S0",)),
        "columns": (torch.randn(60, 80), ("S1",)),
        "alone": (torch.randn(100, 50), ("R",)),
        "large": (torch.randn(3000, 1500), ("S0",)),
        "prime": (torch.randn(50257, 31), ("R",)),
        "long": (torch.randn(2, 1_100_003), ("R",)),
        "bf16": (torch.randn(700, 30).bfloat16(), ("S0",)),
        "fp8": (torch.randn(6000).to(torch.float8_e4m3fn), ("R",)),
        "complex": (torch.randn(3000, dtype=torch.complex64), ("R",)),
        "flag": (torch.rand(5000) < 0.5, ("R",)),
        "empty": (torch.randn(0, 3), ("S0",)),
        "small": (torch.arange(5), ("R",)),
    }
    save(storage, ATTEMPT, 4, placed(tensors, line(4)), codec=codec)
    found = read_elsewhere(tmp_path / ATTEMPT.path)
    for key, (tensor, _) in tensors.items():
        array = found.pop(key)
        assert array["shape"] == list(tensor.shape), key
        assert array["sha256"] == sha256(tensor), key
    assert found == {}
    for rank in range(4):
        raw = zarr.open_array(tmp_path / ATTEMPT.path / f"packs/{rank:05d}", mode="r")[:].tobytes()
        assert (tmp_path / ATTEMPT.path / f"packs/{rank:05d}/c/0").read_bytes().startswith(raw)


def test_boxes_without_a_common_grid_are_arrays_of_their_own(storage: PosixStorage, tmp_path: Path) -> None:
    uneven = torch.randn(50, 701)
    save(storage, ATTEMPT, 4, placed({"w": (uneven, ("S1",))}, line(4)), codec=BLOSC)
    found = read_elsewhere(tmp_path / ATTEMPT.path)
    assert found["w"] == {"group": {"key": "w", "dtype": "float32", "shape": [50, 701], "boxes": 4}}
    for number, begin in enumerate(range(0, 701, 176)):
        assert found[f"w/box-{number:05d}"]["sha256"] == sha256(uneven[:, begin : begin + 176])


def test_frames_that_end_elsewhere_than_shards_are_shown_box_by_box(
    tiny: None, storage: PosixStorage, tmp_path: Path
) -> None:
    tensor = torch.arange(134, dtype=torch.uint8)  # 67 for each of two ranks: no whole number of frames
    save(storage, ATTEMPT, 2, placed({"w": (tensor, ("S0",))}, line(2)), codec=BLOSC)
    found = read_elsewhere(tmp_path / ATTEMPT.path)
    assert found["w/box-00000"]["sha256"] == sha256(tensor[:67])
    assert found["w/box-00001"]["sha256"] == sha256(tensor[67:])
    check_equal_on(storage, 3, placed({"w": (tensor, ("S0",))}, line(3)))


def test_state_that_can_be_compressed_takes_less_room(tmp_path: Path) -> None:
    state = {"w": torch.randn(500, 1000).bfloat16().float(), "small": torch.randn(3)}
    for name, codec in (("plain", None), ("packed", "blosc-zstd")):
        ftrain.save(tmp_path / name, state, compress=codec)
    sizes = {name: (tmp_path / name / "packs/00000/c/0").stat().st_size for name in ("plain", "packed")}
    assert sizes["packed"] < 0.5 * sizes["plain"]
    loaded = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    ftrain.load(tmp_path / "packed", loaded)
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    assert verify(find(str(tmp_path / "packed"))).strange == ()


def test_state_too_small_to_be_compressed_is_saved_as_it_always_was(tmp_path: Path) -> None:
    state = {"w": torch.randn(1024), "n": 3}
    ftrain.save(tmp_path / "plain", state)
    ftrain.save(tmp_path / "packed", state, compress="zstd")
    for file in ("manifest.json", "refs.json", "packs/00000.index.json", "packs/00000/c/0", "packs/00000/zarr.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes()


def test_asynchronous_saves_are_compressed_too(tmp_path: Path) -> None:
    state = {"w": torch.zeros(300, 1000)}
    for number in range(3):
        state["w"] += 1.0
        saving = ftrain.async_save(tmp_path / str(number), state, compress="lz4")
        saving.staged()
        saving.result()
    for number in range(3):
        ftrain.load(tmp_path / str(number), state)
        assert torch.equal(state["w"], torch.full((300, 1000), number + 1.0))
        assert (tmp_path / str(number) / "packs/00000/c/0").stat().st_size < 100_000


def test_codec_that_nobody_knows_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"compress='gzip': there are zstd, blosc-zstd, blosc-lz4"):
        ftrain.save(tmp_path / "x", {"w": torch.ones(10)}, compress="gzip")
    assert not (tmp_path / "x").exists()


def test_a_format_is_said_that_versions_without_compression_refuse(tmp_path: Path) -> None:
    ftrain.save(tmp_path / "x", {"w": torch.ones(5000)}, compress="zstd")
    assert decode_manifest((tmp_path / "x/manifest.json").read_bytes(), "").format == 2
    hostile.change_manifest(tmp_path / "x", lambda fields: fields.update(format=1))
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json: is of format 1, its packs are not"):
        ftrain.load(tmp_path / "x", {"w": torch.ones(5000)})


# ---------------------------------------------------------------------------------------------- histories of all kinds


def test_later_commits_refer_to_compressed_and_plain_packs_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    persist = run.world.persist
    codec: list[Codec | None] = [None]
    monkeypatch.setattr(run.world, "persist", lambda *more: persist(*more, codec=codec[0]))
    attempts = []
    for one, changed in ((None, ""), (BLOSC, "a"), (BLOSC, "b"), (None, "c"), (CODECS[0], "d"), (None, "e")):
        codec[0] = one
        attempts.append(run.commit(*changed))
    assert {attempts[0], attempts[2], attempts[4]} <= set(run.live[-1].refers)
    for body in run.live:
        run.check(body)
    found = read_elsewhere(tmp_path / attempts[-1].path)
    for key in KEYS:
        assert found[key]["sha256"] == sha256(run.state[key]), key


def test_damage_of_a_compressed_box_that_is_referred_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    persist = run.world.persist
    monkeypatch.setattr(run.world, "persist", lambda *more: persist(*more, codec=BLOSC))
    first, _ = run.commit(), run.commit("a")
    box = next(box for box in index_of(run.storage, first, 1).boxes if box.key == "rank-1 alone")
    flip(tmp_path / first.path / "packs/00001/c/0", box.offset + 20)
    with pytest.raises(
        CorruptCheckpoint, match=rf"{first.path}/packs/00001/c/0: .*offset {box.offset} .*rank-1 alone.*rank 1"
    ):
        run.check(run.live[-1])


# ------------------------------------------------------------------------------------------------ damage and strangers


def index_of(storage: PosixStorage, attempt: Attempt, rank: int):  # type: ignore[no-untyped-def]
    return decode_index(storage.read(f"{attempt.path}/packs/{rank:05d}.index.json"), "")


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as data:
        data.seek(at)
        (byte,) = data.read(1)
        data.seek(at)
        data.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("loaded_on", [2, 3])
def test_a_changed_byte_names_tensor_rank_file_and_offset(
    storage: PosixStorage, tmp_path: Path, loaded_on: int
) -> None:
    tensors = {"u": (torch.randn(5000), ("S0",)), "w": (torch.randn(3000, 1000), ("S0",))}
    save(storage, ATTEMPT, 2, placed(tensors, line(2)), codec=BLOSC)
    index = index_of(storage, ATTEMPT, 1)
    box, own = index.boxes[1], index.frames[1]
    offset = box.offset + own.nbytes[0]
    file = tmp_path / ATTEMPT.path / "packs/00001/c/0"
    flip(file, offset + own.nbytes[1] // 2)
    where = rf"{file}: the {own.nbytes[1]} bytes at offset {offset}"
    named = rf"{where} do not match their checksum \(tensor w, saved by rank 1\)"
    with pytest.raises(CorruptCheckpoint, match=named):
        load(Checkpoint.open(storage, ATTEMPT.path), loaded_on, placed(tensors, line(loaded_on)))
    with pytest.raises(CorruptCheckpoint, match=rf"{file}: .*tensor w"):
        verify(find(str(tmp_path / ATTEMPT.path)))


def replace_frame(path: Path, make: Callable[[bytes], bytes]) -> None:
    """Put other bytes in the place of the one frame of a checkpoint, with all checksums right, as a stranger would."""
    file = path / "packs/00000/c/0"
    fields = json.loads((path / "packs/00000.index.json").read_bytes())
    data, chunk = bytearray(file.read_bytes()), fields["chunk_bytes"]
    (own,) = [one for one in fields["frames"] if one]
    frame = make(bytes(data[: own["nbytes"][0]]))
    data[: len(frame)] = frame
    file.write_bytes(data)
    chunks = [_native.crc32c(data[at : at + chunk]) for at in range(0, fields["payload_bytes"], chunk)]

    def change(fields: Any) -> None:
        fields["frames"] = [{**own, "nbytes": [len(frame)], "crc32c": [_native.crc32c(frame)]}]
        fields.update(box_crc32c=[_native.crc32c(frame)], chunk_crc32c=chunks)

    hostile.change_index(path, change)
    index = decode_index((path / "packs/00000.index.json").read_bytes(), "")
    (path / "refs.json").write_bytes(references([index]))


def bomb(name: str) -> bytes:
    """A frame of hardly any bytes that becomes 16 MiB."""
    zeros = np.zeros(16 << 20, np.uint8)
    return encode(Codec.parse(name), zeros.ctypes.data, len(zeros), len(zeros), 1)


@pytest.mark.parametrize("name", ["zstd", "blosc-zstd", "blosc-lz4"])
@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("bomb", "say that they become 16777216 bytes instead of 262144"),
        ("another codec", "are no frame of their codec"),
        ("no size", "are no frame of their codec"),
        ("shorter inside", "cannot be decoded"),
    ],
)
def test_a_frame_that_becomes_something_else_is_refused(tmp_path: Path, name: str, attack: str, said: str) -> None:
    path = tmp_path / "x"
    ftrain.save(path, {"w": torch.randn(65536)}, compress=name)

    def make(frame: bytes) -> bytes:
        if attack == "bomb":
            return bomb(name)
        if attack == "another codec":
            data = np.zeros(65536, np.float32)
            other = "blosc-lz4" if name != "blosc-lz4" else "blosc-zstd"
            return encode(Codec.parse(other), data.ctypes.data, data.nbytes, data.nbytes, 4)
        if attack == "no size":
            return frame[:4] + bytes([frame[4] & 0x1F]) + frame[5:] if name == "zstd" else frame[:12]
        half = len(frame) // 2
        return frame[:half] if name == "zstd" else frame[:16] + bytes(len(frame) - 16)

    replace_frame(path, make)
    named = rf"{path}/packs/00000/c/0: the \d+ bytes at offset 0 {said}.*tensor w, saved by rank 0"
    with pytest.raises(CorruptCheckpoint, match=named):
        ftrain.load(path, {"w": torch.zeros(65536)})
    with pytest.raises(CorruptCheckpoint, match=named):
        verify(find(str(path)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index.update(codec="gzip:1"), "compressed with 'gzip:1', which is not read"),
        (lambda index: index.update(codec="zstd"), "compressed with 'zstd', which is not read"),
        (lambda index: index.update(codec="zstd:99"), "which is not read"),
        (lambda index: index.update(codec=""), "do not go together"),
        (lambda index: index.update(format=1), "do not go together"),
        (lambda index: index.update(frames=[None]), "do not go together"),
        (lambda index: index["frames"].append(None), "not those of the boxes"),
        (lambda index: index["frames"][0].update(more=1), "unknown field"),
        (lambda index: index["frames"][0].update(shape=[1 << 40]), "over the limit"),
        (lambda index: index["frames"][0].update(shape=[1]), "has 1 frames"),
        (lambda index: index["frames"][0].update(nbytes=[1 << 30]), "too many bytes"),
        (lambda index: index["frames"][0].update(nbytes=[200_000]), "beyond the payload"),
        (lambda index: index["frames"][0].update(crc32c=[]), "0 checksums"),
    ],
)
def test_an_index_that_no_writer_makes_is_refused(tmp_path: Path, change: Callable[[Any], None], said: str) -> None:
    path = tmp_path / "x"
    ftrain.save(path, {"w": torch.zeros(65536)}, compress="zstd")
    hostile.change_index(path, change)
    with pytest.raises(CorruptCheckpoint, match=said):
        ftrain.load(path, {"w": torch.zeros(65536)})


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_frames_with_any_byte_changed_are_refused_or_become_as_many_bytes(codec: Codec) -> None:
    """What a stranger's frame can do with the library: nothing but fill the memory that it is given."""
    random = np.random.default_rng(0)
    data = random.normal(size=4096).astype(np.float32)
    good = encode(codec, data.ctypes.data, data.nbytes, data.nbytes, 4)
    guard = 4096
    room = np.full(data.nbytes + 2 * guard, 7, np.uint8)
    for _ in range(2000):
        bad = np.frombuffer(good, np.uint8).copy()
        for at in random.integers(0, len(bad) if random.random() < 0.5 else 64, random.integers(1, 4)):
            bad[at] = random.integers(0, 256)
        bad = bad[: random.integers(1, len(bad) + 1)] if random.random() < 0.2 else bad
        with contextlib.suppress(CorruptCheckpoint):
            decode(codec, bad, room[guard:-guard])
        assert (room[:guard] == 7).all() and (room[-guard:] == 7).all()
    decode(codec, np.frombuffer(good, np.uint8), room[guard:-guard])
    assert room[guard:-guard].tobytes() == data.tobytes()


def test_a_pack_that_is_given_up_stops_its_threads_and_leaves_nothing(tmp_path: Path) -> None:
    tensor = torch.randn(20 << 20)
    with World(1) as world:
        world.plan(lambda _: [item_of("w", tensor)])
        world.take(ATTEMPT, lambda _: [item_of("w", tensor)])
        asked = iter([False, False, False])
        with pytest.raises(StorageError, match="was stopped"):
            persist_slot(
                PosixStorage(tmp_path), ATTEMPT, 0, Arena(world.fds[0]), 0, lambda: next(asked, True), codec=BLOSC
            )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not any(thread.name.startswith("ftrain-encode") for thread in threading.enumerate())

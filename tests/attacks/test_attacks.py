"""Each hostile checkpoint is refused with one of ftrain's errors, as a checkpoint and as the commit of a run.

None of them runs code, reads or writes outside of its directory, takes much memory, or makes anybody wait.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import ftrain
from ftrain.agent.coordinator_host import durable_history
from ftrain.checkpoint.compression import encode
from ftrain.checkpoint.retain import sweep
from ftrain.core.codec import Codec
from ftrain.core.journal import path_of
from ftrain.errors import FtrainError, StorageError
from ftrain.storage import PosixStorage
from tests.attacks import hostile
from tests.checkpoint.test_compression import bomb, replace_frame

MEMORY_BYTES_MAX = 256 << 20
SECRET = b"what is none of a stranger's business"

Attack = Callable[[Path, Path], None]  # on the checkpoint, with a directory outside of it
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


# -------------------------------------------------------------------------------------------- out of the directory


@attack
def pack_is_a_link_to_a_file_elsewhere(path: Path, outside: Path) -> None:
    whole = outside / "pack"
    shutil.copy(path / "packs/00000/c/0", whole)  # even if all sums are right
    hostile.replace_by_link(path / "packs/00000/c/0", whole)


@attack
def pack_is_a_link_that_climbs(path: Path, outside: Path) -> None:
    shutil.copy(path / "packs/00000/c/0", outside / "pack")
    up = "../" * 30
    hostile.replace_by_link(path / "packs/00000/c/0", f"{up}{str(outside / 'pack').lstrip('/')}")


@attack
def packs_are_a_link_to_a_directory_elsewhere(path: Path, outside: Path) -> None:
    shutil.copytree(path / "packs", outside / "packs")
    hostile.replace_by_link(path / "packs", outside / "packs")


@attack
def index_is_a_link_to_a_file_elsewhere(path: Path, outside: Path) -> None:
    hostile.replace_by_link(path / "packs/00000.index.json", outside / "secret")


@attack
def manifest_is_a_link_to_a_file_elsewhere(path: Path, outside: Path) -> None:
    shutil.copy(path / "manifest.json", outside / "manifest.json")
    hostile.replace_by_link(path / "manifest.json", outside / "manifest.json")


@attack
def manifest_names_a_pack_above_it(path: Path, outside: Path) -> None:
    hostile.change_manifest(path, lambda fields: fields["packs"][0].update(path="../../outside/pack"))


@attack
def manifest_names_an_absolute_index(path: Path, outside: Path) -> None:
    hostile.change_manifest(path, lambda fields: fields["packs"][0].update(index_path=str(outside / "secret")))


# ------------------------------------------------------------------------------------------------------------ waiting


@attack
def pack_is_a_pipe(path: Path, outside: Path) -> None:
    hostile.replace_by_pipe(path / "packs/00000/c/0")


@attack
def manifest_is_a_pipe(path: Path, outside: Path) -> None:
    hostile.replace_by_pipe(path / "manifest.json")


@attack
def index_is_a_pipe(path: Path, outside: Path) -> None:
    hostile.replace_by_pipe(path / "packs/00000.index.json")


@attack
def pack_is_a_device(path: Path, outside: Path) -> None:
    hostile.replace_by_link(path / "packs/00000/c/0", "/dev/zero")


@attack
def manifest_is_a_device(path: Path, outside: Path) -> None:
    hostile.replace_by_link(path / "manifest.json", "/dev/zero")


# ------------------------------------------------------------------------------------------------------------- memory


@attack
def manifest_of_a_tebibyte(path: Path, outside: Path) -> None:
    hostile.grow(path / "manifest.json", 1 << 40)


@attack
def index_of_a_tebibyte(path: Path, outside: Path) -> None:
    hostile.grow(path / "packs/00000.index.json", 1 << 40)


@attack
def pack_of_a_tebibyte(path: Path, outside: Path) -> None:
    hostile.grow(path / "packs/00000/c/0", 1 << 40)


@attack
def tensor_larger_than_its_file(path: Path, outside: Path) -> None:
    huge = {"shape": [1 << 45], "box_shape": [1 << 45], "nbytes": 4 << 45}
    hostile.change_index(path, lambda fields: fields["boxes"][0].update(huge))


@attack
def payload_larger_than_its_file(path: Path, outside: Path) -> None:
    def change(fields: Any) -> None:
        fields.update(payload_bytes=4096 << 40, image_bytes=4097 << 40)

    hostile.change_index(path, change)


@attack
def world_of_a_billion_ranks(path: Path, outside: Path) -> None:
    hostile.change_manifest(path, lambda fields: fields.update(world_size=1 << 40))


@attack
def numbers_beyond_64_bits(path: Path, outside: Path) -> None:
    hostile.change_index(path, lambda fields: fields["boxes"][0].update(offset=1 << 80))


@attack
def plain_data_nested_without_end(path: Path, outside: Path) -> None:
    def change(fields: Any) -> None:
        value: Any = 1
        for _ in range(500):
            value = [value]
        fields["plain"] = {"tracked": {"": value}}

    hostile.change_index(path, change)


@attack
def manifest_of_brackets(path: Path, outside: Path) -> None:
    (path / "manifest.json").write_bytes(b"[" * 1_000_000)


@attack
def integer_of_a_million_digits(path: Path, outside: Path) -> None:
    (path / "manifest.json").write_bytes(b'{"sha256":"' + b"0" * 64 + b'","manifest":' + b"9" * 1_000_000 + b"}")


# ---------------------------------------------------------------------------------------------------------------- lies


@attack
def unknown_dtype(path: Path, outside: Path) -> None:
    hostile.change_index(path, lambda fields: fields["boxes"][0].update(dtype="object"))


@attack
def negative_offset(path: Path, outside: Path) -> None:
    hostile.change_index(path, lambda fields: fields["boxes"][0].update(offset=-4096))


@attack
def box_outside_of_its_tensor(path: Path, outside: Path) -> None:
    hostile.change_index(path, lambda fields: fields["boxes"][0].update(box_offset=[1 << 40]))


@attack
def unknown_field_that_names_a_class(path: Path, outside: Path) -> None:
    hostile.change_index(path, lambda fields: fields.update({"__reduce__": ["os.system", "true"]}))


@attack
def index_is_a_pickle(path: Path, outside: Path) -> None:
    (path / "packs/00000.index.json").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


@attack
def no_index_at_all(path: Path, outside: Path) -> None:
    (path / "packs/00000.index.json").unlink()


# -------------------------------------------------------------------------------------------------------- compression


@attack
def frame_of_hardly_any_bytes_that_becomes_16_mebibytes(path: Path, outside: Path) -> None:
    hostile.compress(path)
    replace_frame(path, lambda _: bomb("zstd"))


@attack
def frame_of_another_codec(path: Path, outside: Path) -> None:
    hostile.compress(path)
    weights = np.ones(1500, np.float32)
    frame = encode(Codec.parse("blosc-lz4"), weights.ctypes.data, weights.nbytes, weights.nbytes, 4)
    replace_frame(path, lambda _: frame)


@attack
def frame_cut_in_the_middle(path: Path, outside: Path) -> None:
    hostile.compress(path)
    replace_frame(path, lambda frame: frame[: len(frame) // 2])


@attack
def codec_that_is_not_on_the_list(path: Path, outside: Path) -> None:
    hostile.compress(path)
    hostile.change_index(path, lambda fields: fields.update(codec="pickle:1"))


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "secret").write_bytes(SECRET)
    return directory


@pytest.fixture(autouse=True)
def nothing_happens() -> Iterator[None]:
    """No module is loaded by name, no process started, and not much memory taken."""
    process = psutil.Process()
    before = process.memory_info().rss
    children = process.children()
    yield
    assert process.memory_info().rss - before < MEMORY_BYTES_MAX
    assert process.children() == children
    assert "this" not in sys.modules


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_checkpoint_is_refused(tmp_path: Path, outside: Path, name: str) -> None:
    path = hostile.checkpoint(tmp_path / "checkpoint")
    ATTACKS[name](path, outside)
    state = hostile.state()
    with pytest.raises(FtrainError) as refusal:
        ftrain.load(path, state)
    assert SECRET.decode() not in str(refusal.value)
    assert not state["w"].any()
    assert (outside / "secret").read_bytes() == SECRET


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_commit_of_a_run_is_refused(tmp_path: Path, outside: Path, name: str) -> None:
    path = hostile.checkpoint(tmp_path / "checkpoint")
    ATTACKS[name](path, outside)
    run = hostile.as_run(path, tmp_path / "run")
    state = hostile.state()
    with pytest.raises(FtrainError) as refusal:
        ftrain.load(run, state)
    assert SECRET.decode() not in str(refusal.value)
    assert not state["w"].any()


@pytest.mark.parametrize("kind", ["link", "pipe", "tebibyte", "brackets", "another's"])
def test_a_hostile_journal_is_refused(tmp_path: Path, outside: Path, kind: str) -> None:
    run = hostile.as_run(hostile.checkpoint(tmp_path / "checkpoint"), tmp_path / "run")
    record = run / path_of(2)
    match kind:
        case "link":
            shutil.copy(record, outside / "record")
            hostile.replace_by_link(record, outside / "record")
        case "pipe":
            hostile.replace_by_pipe(record)
        case "tebibyte":
            hostile.grow(record, 1 << 40)
        case "brackets":
            record.write_bytes(b"[" * 1_000_000)
        case _:
            data = json.loads(record.read_bytes())
            data["record"]["sequence"] = 3
            record.write_text(json.dumps(data))
    with pytest.raises(FtrainError):
        ftrain.load(run, hostile.state())
    with pytest.raises(FtrainError):
        durable_history(PosixStorage(run))


@pytest.mark.parametrize("level", ["step-000000000009/g0001-a1", "step-000000000009"])
def test_garbage_that_is_a_link_is_removed_without_what_it_leads_to(tmp_path: Path, outside: Path, level: str) -> None:
    run = tmp_path / "run"
    link = run / "checkpoints" / level
    link.parent.mkdir(parents=True)
    (outside / "g0001-a1").mkdir()
    (outside / "g0001-a1" / "precious").write_bytes(SECRET)
    link.symlink_to(outside)
    with contextlib.suppress(StorageError):  # a link above it is not followed
        sweep(PosixStorage(run), [], 5)
    assert (outside / "secret").read_bytes() == SECRET
    assert (outside / "g0001-a1" / "precious").read_bytes() == SECRET


@pytest.mark.parametrize("directory", ["checkpoints", "journal"])
def test_nothing_is_written_through_a_link_out_of_the_run(tmp_path: Path, outside: Path, directory: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / directory).symlink_to(outside)
    with pytest.raises(StorageError, match="link"):
        PosixStorage(run).create(f"{directory}/file", b"x")
    assert [entry.name for entry in outside.iterdir()] == ["secret"]

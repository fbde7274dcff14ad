"""`save` with `compress` on several ranks, into a store, and what the tools say of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ftrain
from ftrain.checkpoint.writing import encoded_pack
from ftrain.checkpoint.writing.encoded_pack import AHEAD, EncodedPack
from ftrain.checkpoint.writing.pack_plan import PackPlan
from ftrain.core.codec import Codec
from ftrain.core.frames import FRAME_BYTES_MAX
from ftrain.core.layout import CHUNK_BYTES_MAX, TensorSpec
from ftrain.core.messages import Attempt
from ftrain.core.write_plan import write_plan
from ftrain.errors import ExitCode, FtrainError
from ftrain.storage.base import Effort
from tests.checkpoint.ranks import together
from tests.checkpoint.test_zarr_view import read_elsewhere, sha256
from tests.storage.conftest import azurite, moto, seaweedfs, store
from tests.storage.servers import Server
from tests.tools.runs import ckpt

__all__ = ["azurite", "moto", "seaweedfs", "store"]
HERE = __name__


def whole() -> torch.Tensor:
    return torch.arange(6000.0).reshape(3000, 2)


def save_sharded(rank: int, folder: str, codecs: list[str | None]) -> str:
    tensor = distribute_tensor(whole(), init_device_mesh("cpu", (2,)), [Shard(0)])
    try:
        ftrain.save(folder, {"w": tensor, "same": whole() + 1}, compress=codecs[rank])
    except FtrainError as error:
        return str(error)
    loaded = distribute_tensor(torch.zeros(3000, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    ftrain.load(folder, {"w": loaded}, strict=False)
    return "" if torch.equal(loaded.to_local(), tensor.to_local()) else "other bits"


def test_ranks_save_together_and_zarr_sees_whole_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert together(tmp_path, 2, f"{HERE}:save_sharded", folder=str(path), codecs=["blosc-zstd"] * 2) == ["", ""]
    found = read_elsewhere(path)
    assert found["w"]["sha256"] == sha256(whole())
    assert found["same"]["sha256"] == sha256(whole() + 1)
    state = {"w": torch.zeros(3000, 2), "same": torch.zeros(3000, 2)}
    ftrain.load(path, state)
    assert torch.equal(state["w"], whole())
    assert torch.equal(state["same"], whole() + 1)


def test_ranks_that_do_not_agree_on_a_codec_commit_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    told = together(tmp_path, 2, f"{HERE}:save_sharded", folder=str(path), codecs=["zstd", None])
    assert all("rank 0 compresses with zstd:3, rank 1 with None: give save the same compress" in one for one in told)
    assert not (path / "manifest.json").exists()


def test_compressed_checkpoint_in_a_store_is_written_in_parts_and_read_back(store: Server) -> None:
    url = store.new_url()
    state = {"noise": torch.randn(5 << 20), "zeros": torch.zeros(1 << 20)}
    ftrain.save(url, state, compress="lz4")
    found = {key: torch.ones_like(tensor) for key, tensor in state.items()}
    ftrain.load(url, found)
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert ckpt("verify", url).code == 0


def test_tools_read_compressed_checkpoints_as_others(tmp_path: Path) -> None:
    state = {"m": {"w": torch.randn(500, 30).bfloat16().float(), "v": torch.arange(10_000)}}
    ftrain.save(tmp_path / "plain", state)
    ftrain.save(tmp_path / "packed", state, compress="blosc-zstd:5")
    assert ckpt("diff", tmp_path / "plain", tmp_path / "packed").code == 0
    assert "with blosc-zstd:5)" in ckpt("show", tmp_path / "packed").text
    shown = {name: ckpt("show", tmp_path / name, "--stats", "--json").json for name in ("plain", "packed")}
    assert shown["packed"]["tensors"] == shown["plain"]["tensors"]
    assert (shown["plain"]["codecs"], shown["packed"]["codecs"]) == ([], ["blosc-zstd:5"])
    assert shown["packed"]["stored_bytes"] < shown["plain"]["stored_bytes"] == 140_000
    for name in ("plain", "packed"):
        assert ckpt("export", tmp_path / name, tmp_path / f"{name}.safetensors", "--all").code == 0
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "packed.safetensors").read_bytes()
    with (tmp_path / "packed/packs/00000/c/0").open("r+b") as data:
        data.write(b"x")
    assert ckpt("verify", tmp_path / "packed").code == ExitCode.STORAGE


def test_few_frames_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(40 << 20, dtype=torch.float16)
    plan = PackPlan(0, 1, write_plan([[TensorSpec("w", "float16", tuple(tensor.shape))]])[0])
    made = [0]
    real = encoded_pack.encode

    def encode(*more: object) -> bytes:
        frame = real(*more)  # type: ignore[arg-type]
        made[0] += len(frame)
        return frame

    monkeypatch.setattr(encoded_pack, "encode", encode)
    effort = Effort(threads=2)
    pack = EncodedPack(plan.index(Attempt(1, 1, 1), {}), [tensor.data_ptr()], Codec.parse("lz4"), effort)
    written, held = 0, []
    for part in pack:
        held.append(made[0] - written)
        written += len(part)
    assert max(held) <= (AHEAD * effort.threads + 2) * FRAME_BYTES_MAX + CHUNK_BYTES_MAX
    assert made[0] <= written == pack.index.image_bytes <= pack.nbytes_max


def test_who_compresses_nothing_loads_no_codec(tmp_path: Path) -> None:
    program = f"""
import sys, torch, ftrain
ftrain.save({str(tmp_path / "x")!r}, {{"w": torch.ones(5000)}})
ftrain.load({str(tmp_path / "x")!r}, {{"w": torch.ones(5000)}})
assert "numcodecs" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

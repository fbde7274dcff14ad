"""Other formats: what `export` wrote is read by their own readers, and what their writers wrote is taken in."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zarr

import ftrain
from ftrain.checkpoint.foreign.opening import open_foreign
from ftrain.checkpoint.tools import stream
from ftrain.core.layout import ITEM_BYTES
from tests.tools.runs import ckpt, model

safetensors = pytest.importorskip("safetensors.torch")

DTYPES = sorted(ITEM_BYTES)
IN_SAFETENSORS = [dtype for dtype in DTYPES if dtype not in ("complex32", "complex128") and "fnuz" not in dtype]
IN_TORCH = [dtype for dtype in DTYPES if dtype != "complex32"]
Tensors = dict[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), bytes(raw.numpy())


def check_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert bits(one[key]) == bits(other[key]), key


def tensors(dtypes: list[str]) -> Tensors:
    """Any bits whatever, NaN payloads included; also a scalar and one without elements."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for dtype in dtypes:
        raw = torch.randint(0, 2 if dtype == "bool" else 256, (35 * ITEM_BYTES[dtype],), generator=generator)
        found[f"layers.0.{dtype}"] = raw.to(torch.uint8).view(getattr(torch, dtype)).reshape(5, 7)
    return {**found, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}


def saved(path: Path, state: Tensors) -> Path:
    ftrain.save(path, {"model": state}, step=7)
    return path


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How large tensors are cut on their way."""
    if request.param == "in pieces":
        monkeypatch.setattr(stream.boxes, "__defaults__", (16,))
        monkeypatch.setattr(stream, "BATCH_BYTES", 100)
    return str(request.param)


@pytest.mark.usefixtures("pieces")
def test_safetensors_that_are_exported_are_read_by_safetensors(tmp_path: Path) -> None:
    state = tensors(IN_SAFETENSORS)
    assert ckpt("export", saved(tmp_path / "c", state), tmp_path / "out", "--name", "model").code == 0
    check_same(safetensors.load_file(tmp_path / "out" / "model.safetensors"), state)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_name_of_a_safetensors_file_is_that_of_one_file(tmp_path: Path) -> None:
    state = {f"w{n}": torch.randn(10, 10) for n in range(5)}
    out = tmp_path / "out.safetensors"
    assert ckpt("export", saved(tmp_path / "c", state), out, "--name", "model", "--shard-size", "1kB").code == 0
    check_same(safetensors.load_file(out), state)


def test_safetensors_are_cut_into_files_with_an_index_as_hugging_face_has_it(tmp_path: Path) -> None:
    state = {f"w{n}": torch.randn(10, 10) for n in range(5)}
    found = ckpt("export", saved(tmp_path / "c", state), tmp_path / "out", "--name", "model", "--shard-size", "1kB")
    assert found.code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)), "model.safetensors.index.json"]
    loaded: Tensors = {}
    for name in names[:-1]:
        loaded |= safetensors.load_file(tmp_path / "out" / name)
    check_same(loaded, state)
    again = open_foreign(tmp_path / "out")
    assert again is not None and again.step == 7
    check_same({piece.key: piece.tensor for piece in stream.pieces(again, list(state))}, state)


@pytest.mark.usefixtures("pieces")
def test_torch_files_that_are_exported_are_read_by_torch(tmp_path: Path) -> None:
    state = tensors(IN_TORCH)
    assert ckpt("export", saved(tmp_path / "c", state), tmp_path / "out.pt", "--name", "model").code == 0
    check_same(torch.load(tmp_path / "out.pt", weights_only=True), state)
    check_same(torch.load(tmp_path / "out.pt", weights_only=True, mmap=True), state)


def test_everything_in_a_torch_file_is_by_object(tmp_path: Path) -> None:
    net = model()
    ftrain.save(tmp_path / "c", {"model": net, "ema": {"w": torch.ones(2)}}, step=7)
    assert ckpt("export", tmp_path / "c", tmp_path / "out.pt", "--all").code == 0
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found.keys() == {"model", "ema", "step"}
    assert found["step"] == 7
    model(1).load_state_dict(found["model"])
    assert ckpt("import", tmp_path / "out.pt", tmp_path / "again").code == 0
    assert ckpt("diff", tmp_path / "c", tmp_path / "again").code == 0


@pytest.mark.usefixtures("pieces")
def test_dcp_that_is_exported_is_read_by_dcp(tmp_path: Path) -> None:
    state = tensors([dtype for dtype in IN_TORCH if dtype.startswith(("float", "bfloat", "int", "bool"))])
    assert ckpt("export", saved(tmp_path / "c", state), tmp_path / "out", "--to", "dcp", "--name", "model").code == 0
    loaded = {key: torch.zeros_like(value) for key, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, checkpoint_id=tmp_path / "out", no_dist=True)
    check_same(loaded, state)
    assert ckpt("import", tmp_path / "out", tmp_path / "again").code == 0
    assert ckpt("diff", tmp_path / "c", tmp_path / "again").code == 0


@pytest.mark.usefixtures("pieces")
def test_zarr_that_is_exported_is_read_by_zarr(tmp_path: Path) -> None:
    state = tensors(["float32", "bfloat16", "int64", "bool"])
    assert ckpt("export", saved(tmp_path / "c", state), tmp_path / "out.zarr", "--name", "model").code == 0
    root = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert root.attrs["step"] == 7
    read: dict[str, Any] = {key: root[key][...] for key in state}
    assert root["layers.0.bfloat16"].attrs["dtype"] == "bfloat16"
    numbers = {key: torch.as_tensor(value).view(state[key].dtype) for key, value in read.items()}
    check_same(numbers, state)


@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp"])
def test_everything_that_goes_out_comes_in_again(tmp_path: Path, to: str) -> None:
    ftrain.save(tmp_path / "c", {"a": tensors(["float32"]), "b": tensors(["int64"])}, step=7)
    assert ckpt("export", tmp_path / "c", tmp_path / "out", "--to", to, "--all").code == 0
    assert ckpt("import", tmp_path / "out", tmp_path / "again", "--name", "").code == 0
    assert ckpt("diff", tmp_path / "c", tmp_path / "again").code == 0


def test_export_takes_the_one_module_and_converts_on_request(tmp_path: Path) -> None:
    net = model()
    ftrain.save(tmp_path / "c", {"model": net, "other": {"x": torch.ones(1)}})
    assert ckpt("export", tmp_path / "c", tmp_path / "out", "--dtype", "bfloat16").code == 0
    found = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    expected = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in net.state_dict().items()
    }
    check_same(found, expected)


def test_export_only_of_some_and_by_conversion_of_a_file(tmp_path: Path) -> None:
    state = tensors(["float32", "int64"])
    torch.save({"net": state}, tmp_path / "theirs.pt")
    assert ckpt("export", tmp_path / "theirs.pt", tmp_path / "out", "--name", "net", "--only", "net.layers.*").code == 0
    found = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    check_same(found, {key: value for key, value in state.items() if key.startswith("layers")})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--name", "nobody"], "has model, other"),
        ([], "several modules"),
        (["--all", "--name", "model"], "exclude each other"),
        (["--to", "gguf"], "safetensors, torch, dcp, zarr"),
        (["--name", "model", "--dtype", "int8"], "floating-point"),
        (["--name", "model", "--dtype", "float7"], "float7"),
        (["--name", "model", "--shard-size", "big"], "5GB"),
        (["--name", "model", "--only", "x.*"], "no tensor matches"),
        (["--name", "model", "--only", "other.*"], "nothing to export"),
    ],
)
def test_wrong_exports_are_refused_in_one_sentence(tmp_path: Path, arguments: list[str], says: str) -> None:
    ftrain.save(tmp_path / "c", {"model": model(), "other": model()})
    found = ckpt("export", tmp_path / "c", tmp_path / "out", *arguments)
    assert found.code == 2
    assert says in found.text and "\n" not in found.text
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_export_to_what_exists_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "c", {"x": torch.ones(2)})
    (tmp_path / "out.pt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    for place in ("out.pt", "out"):
        found = ckpt("export", tmp_path / "c", tmp_path / place, "--name", "model")
        assert found.code == 2 and "exists already" in found.text
    assert (tmp_path / "out.pt").read_text() == "mine"


def test_export_of_a_damaged_checkpoint_fails_and_leaves_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "c", {"x": torch.ones(2000)})
    with (tmp_path / "c/packs/00000/c/0").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    for place in ("out", "out.pt", "out.zarr"):
        assert ckpt("export", tmp_path / "c", tmp_path / place, "--name", "model").code == 74
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def _safetensors(path: Path, state: Tensors) -> Path:
    safetensors.save_file(state, path / "theirs.safetensors")
    return path / "theirs.safetensors"


def _torch(path: Path, state: Tensors) -> Path:
    torch.save(state, path / "theirs.pt")
    return path / "theirs.pt"


def _dcp(path: Path, state: Tensors) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=path / "theirs", no_dist=True)
    return path / "theirs"


@pytest.mark.parametrize(("write", "dtypes"), [(_safetensors, IN_SAFETENSORS), (_torch, IN_TORCH), (_dcp, ["float32"])])
def test_what_others_wrote_is_taken_in_bit_by_bit(tmp_path: Path, write: Any, dtypes: list[str]) -> None:
    state = tensors(dtypes)
    assert ckpt("import", write(tmp_path, state), tmp_path / "c", "--step", "3").code == 0
    into = {key: torch.zeros_like(value) for key, value in state.items()}
    assert ftrain.load(tmp_path / "c", {"model": into}).step == 3
    check_same(into, state)
    assert ckpt("verify", tmp_path / "c").code == 0


@pytest.mark.parametrize("write", [_safetensors, _torch, _dcp])
def test_what_others_wrote_is_loaded_into_a_module(tmp_path: Path, write: Any) -> None:
    theirs, ours = model(1), model(2)
    ftrain.load(write(tmp_path, theirs.state_dict()), {"model": ours})
    check_same(ours.state_dict(), theirs.state_dict())


def test_views_ties_and_parameters_in_a_torch_file_are_what_they_were(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "turned": base.t(),
        "part": base[1:3, 2:5],
        "same": base,
        "spread": torch.ones(3, 1).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "deep": [{"x": torch.tensor(1.0)}, 5, "text"],
    }
    torch.save(state, tmp_path / "theirs.pt")
    source = open_foreign(tmp_path / "theirs.pt")
    assert source is not None and source.skipped == 2
    found = {piece.key: piece.tensor for piece in stream.pieces(source, list(source.tensors))}
    expected = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    check_same(found, {**expected, "deep.0.x": torch.tensor(1.0)})
    assert ckpt("import", tmp_path / "theirs.pt", tmp_path / "c").code == 0
    assert ckpt("diff", tmp_path / "theirs.pt", tmp_path / "theirs.pt").code == 0


def test_import_of_what_is_none_of_these_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    found = ckpt("import", tmp_path / "text", tmp_path / "c")
    assert found.code == 2 and "neither safetensors" in found.text

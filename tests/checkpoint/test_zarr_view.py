"""What a person without ftrain sees: packs and tensors through plain zarr and fsspec."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zarr

from ftrain.checkpoint.state.items import TensorItem, item_of
from ftrain.core.layout import ITEM_BYTES, Mesh
from ftrain.core.messages import Attempt
from ftrain.storage import PosixStorage
from ftrain.storage.zarr_view import array_name
from tests.checkpoint.world import bits, line, save, sharded

ATTEMPT = Attempt(1, 10, 1)

# Run as a program of its own, in the attempt's directory: only zarr, fsspec and numpy may be imported.
READER = """
import hashlib, json, sys
import numpy, zarr

def arrays(group, prefix=""):
    for name, node in sorted(group.members()):
        if isinstance(node, zarr.Array):
            data = numpy.asarray(node[...])
            yield prefix + name, {
                "shape": node.shape, "type": str(node.dtype), "attributes": dict(node.attrs),
                "sha256": hashlib.sha256(numpy.ascontiguousarray(data).tobytes()).hexdigest(),
            }
        else:
            yield prefix + name, {"group": dict(node.attrs)}
            yield from arrays(node, prefix + name + "/")

root = zarr.open_group("reference://", storage_options={"fo": "refs.json"}, mode="r")
print(json.dumps(dict(arrays(root))))
assert "ftrain" not in sys.modules and "torch" not in sys.modules
"""


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bits(tensor)).hexdigest()


def read_elsewhere(path: Path) -> dict[str, dict[str, object]]:
    result = subprocess.run([sys.executable, "-I", "-c", READER], cwd=path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, object]] = json.loads(result.stdout)
    return found


def test_every_tensor_is_read_by_plain_zarr_with_the_right_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = 4
    four = line(size)
    grid = Mesh((2, 2), (0, 1, 2, 3))
    shared = {
        "rows": (torch.randn(8, 5), four, ("S0",)),
        "rows.uneven": (torch.randn(10, 5), four, ("S0",)),
        "rows.fewer.than.ranks": (torch.randn(2, 5), four, ("S0",)),
        "rows.nested": (torch.randn(10, 2), grid, ("S0", "S0")),
        "columns": (torch.randn(6, 8), four, ("S1",)),
        "both": (torch.randn(9, 4), grid, ("S0", "S1")),
        "a/b": (torch.randn(3), four, ("R",)),
        "empty": (torch.randn(0, 3), four, ("S0",)),
        "scalar": (torch.tensor(2.5), four, ("R",)),
        "flag": (torch.tensor([True, False]), four, ("R",)),
        "rank-00000": (torch.randn(2), four, ("R",)),
        "large": (torch.randn(3000, 1500), four, ("S0",)),
        "bf16": (torch.randn(7, 3).bfloat16(), four, ("S0",)),
        "fp8": (torch.randn(6).to(torch.float8_e4m3fn), four, ("R",)),
        "complex": (torch.randn(3, dtype=torch.complex64), four, ("R",)),
        "int": (torch.arange(5), four, ("R",)),
    }
    uneven = torch.randn(5, 7)

    def items(rank: int) -> list[TensorItem]:
        return [
            *(sharded(key, tensor, mesh, placements, rank) for key, (tensor, mesh, placements) in shared.items()),
            sharded("columns.uneven", uneven, four, ("S1",), rank),
            item_of("rng", torch.full((rank + 1,), rank, dtype=torch.uint8), private=True),
        ]

    save(PosixStorage(tmp_path), ATTEMPT, size, items)
    found = read_elsewhere(tmp_path / ATTEMPT.path)
    for key, (tensor, _, _) in shared.items():
        array = found.pop(array_name(key))
        assert array["shape"] == list(tensor.shape), key
        assert array["sha256"] == sha256(tensor), key
        name = str(tensor.dtype).removeprefix("torch.")
        assert array["attributes"] == {"key": key, "dtype": name}
        assert array["type"] == {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}.get(name, name)
    for rank in range(size):
        assert found.pop(f"rank-{rank:05d}") == {"group": {"rank": rank}}
        own = found.pop(f"rank-{rank:05d}/rng")
        assert own["sha256"] == sha256(torch.full((rank + 1,), rank, dtype=torch.uint8))
    # Seven columns on four ranks fit no regular grid: each box is an array that says where it belongs.
    place = {"key": "columns.uneven", "dtype": "float32", "shape": [5, 7], "boxes": 4}
    assert found.pop("columns.uneven") == {"group": place}
    for number, (begin, end) in enumerate(((0, 2), (2, 4), (4, 6), (6, 7))):
        box = found.pop(f"columns.uneven/box-{number:05d}")
        assert box["sha256"] == sha256(uneven[:, begin:end])
        assert box["attributes"] == {
            "key": "columns.uneven",
            "dtype": "float32",
            "offset": [0, begin],
            "tensor_shape": [5, 7],
        }
    assert found == {}


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_is_read_as_itself_or_as_integers(tmp_path: Path, dtype: str) -> None:
    tensor = torch.arange(48, dtype=torch.uint8)[: 3 * ITEM_BYTES[dtype]].view(getattr(torch, dtype))
    if dtype == "bool":
        tensor = torch.tensor([True, False, True])
    if ITEM_BYTES[dtype] == 16:
        tensor = torch.tensor([1 + 2j, 3 - 4j, 0], dtype=torch.complex128)
    save(PosixStorage(tmp_path), ATTEMPT, 1, lambda _: [item_of("t", tensor)])
    array = read_elsewhere(tmp_path / ATTEMPT.path)["t"]
    assert array["sha256"] == sha256(tensor)
    assert array["attributes"] == {"key": "t", "dtype": dtype}


@pytest.mark.parametrize("elements", [0, 1, 3000, 5_000_000])
def test_a_pack_is_a_zarr_array_of_its_payload(tmp_path: Path, elements: int) -> None:
    tensor = torch.randint(0, 256, (elements,), dtype=torch.uint8)
    save(PosixStorage(tmp_path), ATTEMPT, 1, lambda _: [item_of("t", tensor)])
    array = zarr.open_array(tmp_path / ATTEMPT.path / "packs" / "00000", mode="r")
    payload = array[:]
    assert isinstance(array.shape[0], int)
    assert payload[:elements].tobytes() == bits(tensor)
    assert not payload[elements:].any()
    # A part is read through the shard's index, as one inner chunk.
    assert bytes(array[elements // 2 : elements // 2 + 10]) == payload[elements // 2 : elements // 2 + 10].tobytes()
    file = tmp_path / ATTEMPT.path / "packs" / "00000" / "c" / "0"
    assert file.stat().st_size % 4096 == 0
    assert file.stat().st_size <= elements + 4 * 4096


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.layer.0.weight", "model.layer.0.weight"),
        ("a/b", "a%2Fb"),
        ("100%", "100%25"),
        ("rank-1", "%72ank-1"),
        ("zarr.json", "%7Aarr.json"),
        (".hidden", "%2Ehidden"),
        ("__x", "%5F_x"),
        ("tab\there", "tab%09here"),
    ],
)
def test_a_key_becomes_one_name_that_nothing_else_has(key: str, name: str) -> None:
    assert array_name(key) == name

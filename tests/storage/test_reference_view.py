"""What a person without ftrain reads of a checkpoint in an object store: every tensor, by zarr and fsspec."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import obstore.store
import pytest
import torch

import ftrain
from ftrain.checkpoint.catalogue import find
from ftrain.checkpoint.tools.verify import verify
from ftrain.core.layout import Mesh
from ftrain.core.messages import Attempt
from ftrain.storage import open_storage
from tests.checkpoint.test_unchanged import Run
from tests.checkpoint.world import bits, line, save, sharded
from tests.storage.servers import BUCKET, AzureServer, S3Server, Server, set_environment

ATTEMPT = Attempt(1, 10, 1)

# Run as a program of its own: only zarr, fsspec, numpy and a file system for the scheme may be imported.
READER = """
import hashlib, json, os, sys
import numpy, zarr

by, here, run, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
if by == "obstore":
    import obstore.fsspec
    obstore.fsspec.register(here.partition(":")[0])

def arrays(group, prefix=""):
    for name, node in sorted(group.members()):
        if isinstance(node, zarr.Array):
            yield prefix + name, hashlib.sha256(numpy.ascontiguousarray(node[...]).tobytes()).hexdigest()
        else:
            yield from arrays(node, prefix + name + "/")

root = zarr.open_group("reference://", mode="r", storage_options={
    "fo": here + "/refs.json", "template_overrides": {"here": here + "/", "run": run + "/"},
    "target_options": options, "remote_options": {**options, "asynchronous": True},
})
assert "ftrain" not in sys.modules and "torch" not in sys.modules
print(json.dumps(dict(arrays(root))), flush=True)
os._exit(0)  # obstore's threads, which go on, were seen to abort an interpreter that ends
"""


def read(here: str, run: str, server: Server, by: str = "obstore") -> dict[str, str]:
    """Digests of all arrays by their names."""
    options = {"client_options": {"allow_http": True}} if by == "obstore" else {"endpoint_url": server.endpoint}
    result = subprocess.run(
        [sys.executable, "-c", READER, by, here, run, json.dumps(options)],
        cwd="/",  # nothing of what it names is there
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout)
    return found


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bits(tensor)).hexdigest()


def commit(url: str) -> dict[str, str]:
    """A checkpoint of four ranks with sharded, replicated, uneven and private tensors; digests of what arrays hold."""
    torch.manual_seed(0)
    four, grid = line(4), Mesh((2, 2), (0, 1, 2, 3))
    shared = {
        "rows.uneven": (torch.randn(10, 5), four, ("S0",)),
        "both": (torch.randn(9, 4), grid, ("S0", "S1")),
        "a/b": (torch.randn(3), four, ("R",)),
        "bf16": (torch.randn(7, 3).bfloat16(), four, ("S0",)),
        "large": (torch.randn(3000, 1500), four, ("S0",)),
        "scalar": (torch.tensor(2.5), four, ("R",)),
    }
    items = [[sharded(key, *what, rank) for key, what in shared.items()] for rank in range(4)]
    save(open_storage(url), ATTEMPT, 4, lambda rank: items[rank])
    return {key.replace("/", "%2F"): sha256(tensor) for key, (tensor, _, _) in shared.items()}


@pytest.mark.parametrize("by", ["obstore", "s3fs"])
def test_every_tensor_of_a_checkpoint_in_a_store_is_read_by_plain_zarr(s3: S3Server, by: str) -> None:
    if importlib.util.find_spec(by) is None:
        pytest.skip(f"no {by}: pip install {by}; obstore's own adapter is tried all the same")
    url = s3.new_url()
    expected = commit(url)
    assert read(f"{url}/{ATTEMPT.path}", url, s3, by) == expected


def test_every_tensor_of_a_checkpoint_in_azure_is_read_by_plain_zarr(
    azurite: AzureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(azurite, monkeypatch)
    url = azurite.new_url()
    expected = commit(url)
    assert read(f"{url}/{ATTEMPT.path}", url, azurite) == expected


@pytest.mark.parametrize("by", ["obstore", "s3fs"])
def test_tensors_that_earlier_commits_in_a_store_hold_are_read_by_plain_zarr(s3: S3Server, by: str) -> None:
    if importlib.util.find_spec(by) is None:
        pytest.skip(f"no {by}: pip install {by}; obstore's own adapter is tried all the same")
    url = s3.new_url()
    run = Run(open_storage(url))
    run.commit()
    attempt = run.commit("a")
    run.check(run.live[-1])
    assert run.live[-1].refers
    found = read(f"{url}/{attempt.path}", url, s3, by)
    expected = {key: sha256(tensor) for key, tensor in run.saved[attempt].items()}
    assert {name.rpartition("/")[2].replace("%72", "r"): digest for name, digest in found.items()} == expected


def test_a_compressed_checkpoint_saved_to_a_store_is_read_by_plain_zarr(s3: S3Server) -> None:
    url, weights = s3.new_url(), torch.arange(100_000.0)
    ftrain.save(url, {"w": weights}, compress="zstd")
    assert read(url, url, s3) == {"w": sha256(weights)}


def test_a_checkpoint_that_was_copied_out_of_a_store_is_read_where_it_is(s3: S3Server, tmp_path: Path) -> None:
    """Its reference view names no bucket."""
    url, weights = s3.new_url(), torch.arange(1000.0)
    ftrain.save(url, {"w": weights})
    prefix = url.split("/", 3)[3]
    store = obstore.store.S3Store(BUCKET, prefix=prefix, client_options={"allow_http": True})
    for page in store.list():
        for found in page:
            target = tmp_path / found["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bytes(store.get(found["path"]).bytes()))
    program = (
        "import zarr, hashlib; r = zarr.open_group('reference://', storage_options={'fo': 'refs.json'}, mode='r'); "
        "print(hashlib.sha256(r['w'][:].tobytes()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.stdout.strip() == sha256(weights), result.stderr
    assert verify(find(str(tmp_path))).strange == ()

"""`ftrain.save`, `async_save` and `load` with a URL, and what other tools read there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import obstore.store
import pytest
import torch
import zarr
from zarr.storage import ObjectStore

import ftrain
from ftrain.errors import AlreadyExists, CheckpointNotFound, UsageError
from ftrain.storage import open_storage
from tests.storage.proxy import LOSE_REQUEST, PASS, Request, proxy_of
from tests.storage.servers import BUCKET, S3Server, Server, set_environment


def state(seed: int = 0) -> dict[str, object]:
    torch.manual_seed(seed)
    return {"model": torch.nn.Linear(64, 32), "big": torch.randn(3 << 20), "epoch": seed}


def test_what_was_saved_to_a_url_is_loaded_from_it(store: Server) -> None:
    url, saved = store.new_url(), state(1)
    ftrain.save(url, saved, step=7)
    found = state(2)
    assert ftrain.load(url, found).step == 7
    assert found["epoch"] == 1
    assert torch.equal(found["big"], saved["big"])
    assert torch.equal(found["model"].weight, saved["model"].weight)
    with pytest.raises(AlreadyExists, match="holds a checkpoint already"):
        ftrain.save(url, saved, step=8)
    handle = ftrain.async_save(f"{url}-2", saved, step=9)
    handle.result()
    assert ftrain.load(f"{url}-2", found).step == 9


def test_where_nothing_was_saved_nothing_is_loaded(store: Server) -> None:
    url = store.new_url()
    with pytest.raises(CheckpointNotFound, match=f"{url} is neither a checkpoint nor a run"):
        ftrain.load(url, state())


def test_a_bucket_alone_is_no_place_for_a_checkpoint(s3: S3Server) -> None:
    with pytest.raises(UsageError, match="name what is to become the checkpoint"):
        ftrain.save("s3://bucket", state())


def test_zarr_reads_a_pack_in_the_store(s3: S3Server) -> None:
    url, saved = s3.new_url(), state(3)
    ftrain.save(url, saved, step=1)
    prefix = f"{url.partition(BUCKET + '/')[2]}/packs/00000"
    store = obstore.store.S3Store(BUCKET, prefix=prefix, client_options={"allow_http": True})
    pack = zarr.open_array(ObjectStore(store, read_only=True), mode="r")
    assert pack.dtype == "uint8"
    assert saved["big"].numpy().tobytes() in pack[:].tobytes()


SAVER = """
import sys, ftrain
from tests.storage.test_save_to_store import state
ftrain.save(sys.argv[1], state(int(sys.argv[2])), step=1)
"""


@pytest.mark.parametrize("kind", ["moto", "seaweedfs"])
def test_a_save_that_was_killed_in_mid_upload_is_cleaned_up_and_done_by_the_next(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from ftrain.storage.uploads import S3Uploads

    server: S3Server = request.getfixturevalue(kind)
    with proxy_of(server) as proxy:
        set_environment(proxy.server, monkeypatch)
        url = proxy.server.new_url()

        def kill_in_an_upload(request: Request) -> str:
            if request.kind != "UploadPart":
                return PASS
            process.send_signal(signal.SIGKILL)
            return LOSE_REQUEST

        proxy.rule = kill_in_an_upload
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, url, "5"], cwd=Path(__file__).parents[2], env=dict(os.environ)
        )
        assert process.wait(120) == -signal.SIGKILL
        proxy.always(PASS)
        prefix = url.partition(f"{BUCKET}/")[2]
        uploads = S3Uploads(proxy.server.endpoint, "us-east-1", BUCKET, "", "key", "secret", "")
        assert len(uploads.find(prefix)) == 1
        with pytest.raises(CheckpointNotFound):
            ftrain.load(url, state())
        ftrain.save(url, state(6), step=2)
        assert uploads.find(prefix) == []
        found = state()
        assert ftrain.load(url, found).step == 2
        assert found["epoch"] == 6
        assert not [name for name in open_storage(url).list("packs/00000/c") if name != "0"]

"""What people give as a place, and which storage that is; the rest is a wrong use, told in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ftrain.cli.options import run_place
from ftrain.errors import StorageError, UsageError
from ftrain.storage import Opener, PosixStorage, open_parent, open_storage
from ftrain.storage.object_store import ObjectStorage


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)


def test_a_path_and_a_url_name_the_storage_above_and_the_name_in_it(tmp_path: Path) -> None:
    storage, name = open_parent(tmp_path / "a" / "b")
    assert (type(storage), storage.url, name) == (PosixStorage, str(tmp_path / "a"), "b")
    storage, name = open_parent("s3://bucket/runs/b/")
    assert (type(storage), storage.url, name) == (ObjectStorage, "s3://bucket/runs", "b")
    storage, name = open_parent(f"file://{tmp_path}/b")
    assert (storage.url, name) == (str(tmp_path), "b")


@pytest.mark.parametrize("place", ["s3://bucket", "s3://bucket/", "gs://", "/"])
def test_a_place_without_a_name_is_a_wrong_use(place: str) -> None:
    with pytest.raises(UsageError):
        open_parent(place)


def test_a_run_in_a_store_has_one_directory_here_that_follows_from_its_url() -> None:
    url, here = run_place("s3://bucket/teams/a b/", "--run-dir")
    assert url == "s3://bucket/teams/a b"
    assert here == run_place("s3://bucket/teams/a b", "RUN_DIR")[1]
    assert here.parent == Path("runs") and here.name.startswith("a_b-")
    assert here != run_place("s3://bucket/others/a b", "RUN_DIR")[1]
    assert run_place("file:///a%20b", "--run-dir") == ("", Path("/a b"))
    assert run_place("a/b", "--run-dir") == ("", Path("a/b"))


def test_an_account_that_is_not_named_is_told() -> None:
    with pytest.raises(UsageError, match=r"^az://box/run: Azure cannot be used: .*Account must be specified$"):
        open_storage("az://box/run")


def test_an_endpoint_that_is_no_url_is_a_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(UsageError, match=r"^AWS_ENDPOINT_URL=localhost:9000: give a URL such as https://HOST:PORT$"):
        open_storage("s3://bucket/run")


def test_plain_http_is_used_only_for_an_endpoint_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="Connection refused"):
        open_storage("s3://bucket/run").read("x")


@pytest.mark.parametrize("name", ["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "GOOGLE_BASE_URL"])
def test_plain_http_to_azure_or_gcs_is_used_only_for_an_endpoint_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    account = {"disable_oauth": True, "gcs_base_url": "http://127.0.0.1:9", "client_email": "", "private_key": ""}
    (tmp_path / "account.json").write_text(json.dumps({**account, "private_key_id": ""}))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    scheme = "gs" if name.startswith("GOOGLE") else "az"
    if scheme == "gs":
        with pytest.raises(StorageError, match="plain http is used only where"):
            open_storage("gs://bucket/run").create("x", b"")
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="Connection refused"):
        open_storage(f"{scheme}://bucket/run").read("x")
    monkeypatch.setenv(name, "127.0.0.1:9")
    with pytest.raises(UsageError, match=f"^{name}=127.0.0.1:9: give a URL such as"):
        open_storage(f"{scheme}://bucket/run")


def test_an_opener_gives_one_storage_for_what_is_below_one_directory(tmp_path: Path) -> None:
    opener = Opener()
    first, name = opener.open(tmp_path / "a" / "1")
    assert (first.url, name) == (str(tmp_path / "a"), "1")
    assert opener.open(f"{tmp_path}/a/2/") == (first, "2")
    assert opener.open(f"{tmp_path}/a//3")[0].url == first.url
    other, name = opener.open(tmp_path / "b" / "1")
    assert (other.url, name) == (str(tmp_path / "b"), "1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a" / "3")
    assert opener.open(tmp_path / "b" / "link")[1] == "3"
    with pytest.raises(UsageError):
        opener.open("/")

"""Stores that a run must not rely on are refused when it starts, in one line: real ones, and one by a wrong key."""

from __future__ import annotations

import urllib.request

import pytest

from ftrain.errors import ExitCode, UsageError
from ftrain.storage import open_storage
from ftrain.storage.bucket import StoreBucket
from ftrain.storage.object_store import ObjectStorage, Patience
from tests.storage.servers import BUCKET, AzureServer, GcsServer, set_environment


def test_an_emulator_of_gcs_that_takes_every_create_is_refused(
    gcs_emulator: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data in (b"first", b"second"):  # as the library asks, GCS's XML API
        asked = urllib.request.Request(f"{gcs_emulator.endpoint}/{BUCKET}/taken", data, method="PUT")
        asked.add_header("x-goog-if-generation-match", "0")
        with urllib.request.urlopen(asked) as reply:
            assert reply.status == 200
    set_environment(gcs_emulator, monkeypatch)
    storage = ObjectStorage(StoreBucket("gs", BUCKET, "run"), patience=Patience(2, 0.001, 0.002))
    with pytest.raises(UsageError) as caught:
        storage.check()
    assert str(caught.value).startswith("gs://bucket/run cannot be used: cannot write gs://bucket/run/.ftrain-probe-")
    assert str(caught.value).endswith(": the answer is not one of such a store (ETag Header missing from response)")
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_wrong_key_is_told_in_one_line(azurite: AzureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(azurite, monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    url = azurite.new_url()
    with pytest.raises(UsageError) as caught:
        open_storage(url).check()
    assert str(caught.value).startswith(f"{url} cannot be used: cannot write {url}/.ftrain-probe-")
    assert "403 Forbidden (AuthorizationFailure: " in str(caught.value)
    assert "\n" not in str(caught.value)

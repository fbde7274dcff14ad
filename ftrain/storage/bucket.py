"""The requests that ftrain makes to an object store: one method for each kind, with nothing decided here.

All that is sent to S3, GCS or Azure goes through a `Bucket`, so that tests can record requests, lose replies, or be
the store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from ftrain.errors import UsageError
from ftrain.storage.replies import reading, writing
from ftrain.storage.uploads import S3Uploads

WRITE_ID = "writeid"  # Azure wants names of metadata to be identifiers
PARTS_IN_FLIGHT = 4
REQUEST_SECONDS_MAX = 60
CONNECT_SECONDS_MAX = 5
_LIST_KEYS = 1000  # of one answer
# Of requests that may be made twice: reads, parts of an upload, removals.
RETRIES_MAX = 6
RETRY_SECONDS_MAX = 60
_SCHEMES = {"s3": "S3", "gs": "Google Cloud Storage", "az": "Azure"}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of an object without reading it."""

    nbytes: int
    write_id: str  # which request made it; empty where it was not one of ours


class Bucket(Protocol):
    """An object store, below some prefix. Keys have `/` between names. All calls may come from several threads."""

    @property
    def url(self) -> str: ...

    def put_new(self, key: str, data: bytes, write_id: str) -> None:
        """One request that makes `key` if it is not there; it is never repeated in here.

        Raises `AlreadyExists`, `UnknownOutcome` where no answer came that says, `StorageError` where it was refused.
        """
        ...

    def put_parts(self, key: str, parts: Iterable[memoryview], part_bytes: int, write_id: str) -> None:
        """Upload the parts, some at a time, and then make `key` of them, whether it is there or not.

        What iterating raises comes out of here, after the upload was given up. Raises as `put_new`, but for the first.
        """
        ...

    def get(self, key: str) -> bytes:
        """Raises `NotFound`, `StorageError`."""
        ...

    def get_range(self, key: str, offset: int, nbytes: int) -> memoryview:
        """Fewer than `nbytes` where the object ends. Raises as `get`, and `CorruptCheckpoint` beyond its end."""
        ...

    def look(self, key: str) -> Found:
        """Raises as `get`."""
        ...

    def names(self, prefix: str) -> tuple[list[str], list[str]]:
        """The names right below `prefix`: of objects, and of further levels. Raises `StorageError`."""
        ...

    def keys(self, prefix: str, count_max: int | None = None) -> list[str]:
        """All keys below `prefix`, or the first of them. Raises `StorageError`."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """No error where they are gone. Raises `StorageError`."""
        ...

    def abort_uploads(self, prefix: str) -> int:
        """Give up the unfinished uploads below `prefix`, as far as the store lets us, and count them."""
        ...


class StoreBucket:
    """A bucket of S3, GCS or Azure, with the credentials of the environment. Raises `UsageError` for a wrong URL."""

    def __init__(self, scheme: str, name: str, prefix: str) -> None:
        self._url = f"{scheme}://{name}/{prefix}".rstrip("/")
        if not name:
            raise UsageError(f"{scheme}://: name the bucket, {scheme}://BUCKET/RUN")
        try:
            self._once = _store(scheme, name, prefix, retries_max=0)
            self._patient = _store(scheme, name, prefix, RETRIES_MAX)
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise UsageError(
                f"{self._url}: {_SCHEMES[scheme]} cannot be used: {str(error).partition(chr(10))[0]}"
            ) from None
        self._uploads = S3Uploads.of_environment(name, prefix) if scheme == "s3" else None

    @property
    def url(self) -> str:
        return self._url

    def put_new(self, key: str, data: bytes, write_id: str) -> None:
        with writing(f"cannot write {self._url}/{key}"):
            obstore.put(self._once, key, data, mode="create", use_multipart=False, attributes={WRITE_ID: write_id})

    def put_parts(self, key: str, parts: Iterable[memoryview], part_bytes: int, write_id: str) -> None:
        with writing(f"cannot write {self._url}/{key}"):
            obstore.put(
                self._patient,
                key,
                iter(parts),
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=PARTS_IN_FLIGHT,
                attributes={WRITE_ID: write_id},
            )

    def get(self, key: str) -> bytes:
        with reading(f"cannot read {self._url}/{key}"):
            return bytes(obstore.get(self._patient, key).bytes())

    def get_range(self, key: str, offset: int, nbytes: int) -> memoryview:
        with reading(f"cannot read {self._url}/{key}"):
            return memoryview(obstore.get_range(self._patient, key, start=offset, length=nbytes))

    def look(self, key: str) -> Found:
        with reading(f"cannot read {self._url}/{key}"):
            found = obstore.get(self._patient, key, options={"head": True})
            return Found(found.meta["size"], found.attributes.get(WRITE_ID, ""))

    def names(self, prefix: str) -> tuple[list[str], list[str]]:
        with reading(f"cannot list {self._url}/{prefix}"):
            found = obstore.list_with_delimiter(self._patient, prefix or None)
            objects = (meta["path"] for meta in found["objects"])
            return _last_names(objects, prefix), _last_names(found["common_prefixes"], prefix)

    def keys(self, prefix: str, count_max: int | None = None) -> list[str]:
        found: list[str] = []
        with reading(f"cannot list {self._url}/{prefix}"):
            for batch in obstore.list(self._patient, prefix or None, chunk_size=count_max or _LIST_KEYS):
                found += [meta["path"] for meta in batch]
                if count_max is not None and len(found) >= count_max:
                    break
        return found[:count_max]

    def delete(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        with reading(f"cannot remove {len(keys)} objects of {self._url}"):
            try:
                obstore.delete(self._patient, list(keys))
            except FileNotFoundError:
                for key in keys:  # a store without removal of many at once, and one of them is gone
                    self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        try:
            obstore.delete(self._patient, key)
        except FileNotFoundError:
            return

    def abort_uploads(self, prefix: str) -> int:
        return 0 if self._uploads is None else self._uploads.abort_all(prefix)


def _last_names(paths: Iterable[str], prefix: str) -> list[str]:
    """Without the level itself, which some stores show."""
    return [path.rpartition("/")[2] for path in (path.rstrip("/") for path in paths) if path != prefix]


def _store(scheme: str, name: str, prefix: str, retries_max: int) -> Any:
    options: Any = {
        "client_options": {
            "timeout": timedelta(seconds=REQUEST_SECONDS_MAX),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS_MAX),
            "allow_http": _plain_http(scheme),
        },
        "retry_config": {"max_retries": retries_max, "retry_timeout": timedelta(seconds=RETRY_SECONDS_MAX)},
        "prefix": prefix or None,
    }
    match scheme:
        case "s3":
            return S3Store(name, **options)
        case "gs":
            return GCSStore(name, **options)
        case _:
            return AzureStore(name, **options)


def _plain_http(scheme: str) -> bool:
    """Only where an endpoint is given that asks for it. Raises `UsageError` for one that is no URL."""
    for name in _ENDPOINTS[scheme]:
        given = os.environ.get(name, "")
        if given and not re.match(r"https?://[^/\s]", given):
            raise UsageError(f"{name}={given}: give a URL such as https://HOST:PORT")
        if given:
            return given.startswith("http://")
    return False

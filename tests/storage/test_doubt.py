"""What POSIX storage does when it cannot know: failed syncs, lost replies, directories that were made anew."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftrain.errors import StorageError, UnknownOutcome
from ftrain.storage import PosixStorage


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are synced from now on."""
    seen: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, is_it: Callable[[Any], bool], done: bool = False) -> None:
    """The first call of `os.name` that `is_it` fails with EIO, although it was done if so."""
    real = getattr(os, name)
    failed = False

    def call(*arguments: Any) -> Any:
        nonlocal failed
        if failed or not is_it(arguments[0]):
            return real(*arguments)
        failed = True
        if done:
            real(*arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, call)


def test_what_is_confirmed_has_its_name_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/1.json").write_bytes(b"x")
    seen = synced(monkeypatch)
    assert PosixStorage(tmp_path).confirm("journal/1.json", b"x")
    assert {str(tmp_path), str(tmp_path / "journal"), str(tmp_path / "journal/1.json")} <= set(seen)


def test_the_name_of_a_directory_that_was_made_anew_is_synced_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, other = PosixStorage(tmp_path), PosixStorage(tmp_path)
    storage.create("checkpoints/step-1/a1/file", b"x")
    other.remove_tree("checkpoints/step-1/a1")  # and step-1 with it; its inode is free
    seen = synced(monkeypatch)
    storage.create("checkpoints/step-1/a2/file", b"x")
    assert str(tmp_path / "checkpoints") in seen


def test_a_directory_whose_name_could_not_be_synced_is_not_written_to_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = PosixStorage(tmp_path)
    storage.create("checkpoints/file", b"x")
    held = str(tmp_path / "checkpoints")
    fail_once(monkeypatch, "fsync", lambda descriptor: str(Path(f"/proc/self/fd/{descriptor}").readlink()) == held)
    with pytest.raises(StorageError):
        storage.create("checkpoints/step-1/a1/file", b"x")
    with pytest.raises(StorageError, match="failed before"):  # the kernel would say that all is well
        storage.create("checkpoints/step-1/a2/file", b"x")
    storage.create("checkpoints/step-2/a1/file", b"x")


def test_a_link_whose_reply_was_lost_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, "link", lambda _: True, done=True)
    PosixStorage(tmp_path).create("file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_link_that_fails_without_saying_why_may_have_been_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, "link", lambda _: True)
    storage = PosixStorage(tmp_path)
    with pytest.raises(UnknownOutcome):
        storage.create("file", b"x")
    assert not storage.confirm("file", b"x")
    storage.create("file", b"x")

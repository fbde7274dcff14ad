"""Small hostile checkpoints: a good one, saved here, with something of it replaced as a stranger would."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ftrain
from ftrain.core.journal import CommitBody, Record, RunBody, digest, encode, path_of
from ftrain.core.messages import Attempt

ATTEMPT = Attempt(1, 0, 1)


def state() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(1500)}


def checkpoint(path: Path) -> Path:
    """A good checkpoint, of which a part may be replaced."""
    ftrain.save(path, {"w": torch.ones(1500)})
    return path


def compress(path: Path) -> None:
    """Make a compressed checkpoint of the one that is there."""
    shutil.rmtree(path)
    ftrain.save(path, {"w": torch.ones(1500)}, compress="zstd")


def as_run(checkpoint: Path, run: Path) -> Path:
    """The same checkpoint as the only commit of a run, whose journal vouches for it."""
    target = run / ATTEMPT.path
    target.parent.mkdir(parents=True)
    shutil.move(checkpoint, target)
    manifest = target / "manifest.json"
    is_small = manifest.is_file() and manifest.stat().st_size < 64 << 20
    sha256 = hashlib.sha256(manifest.read_bytes()).hexdigest() if is_small else "0" * 64
    write_journal(run, [RunBody("run", "job", "1"), CommitBody(ATTEMPT, 1, sha256, 1)])
    return run


def write_journal(run: Path, bodies: list[Any]) -> None:
    previous = ""
    for sequence, body in enumerate(bodies, 1):
        data = encode(Record(sequence, previous, f"stranger:{sequence}", 1.0, body))
        previous = digest(data)
        path = run / path_of(sequence)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def change_index(path: Path, change: Callable[[Any], None]) -> None:
    """Change the pack's index, and make the manifest vouch for it."""
    index = path / "packs/00000.index.json"
    fields = json.loads(index.read_bytes())
    change(fields)
    index.write_text(json.dumps(fields, separators=(",", ":")))
    sha256 = hashlib.sha256(index.read_bytes()).hexdigest()
    change_manifest(path, lambda fields: fields["packs"][0].update(index_sha256=sha256))


def change_manifest(path: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest, with a checksum that is right."""
    manifest = path / "manifest.json"
    fields = json.loads(manifest.read_bytes())["manifest"]
    change(fields)
    raw = json.dumps(fields, separators=(",", ":"))
    sha256 = hashlib.sha256(raw.encode()).hexdigest()
    manifest.write_text(f'{{"sha256":"{sha256}","manifest":{raw}}}\n')


def replace_by_link(path: Path, target: Path | str) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(target)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def grow(path: Path, nbytes: int) -> None:
    """Of so many bytes, which take no room on the disk."""
    with path.open("r+b") as file:
        file.truncate(nbytes)

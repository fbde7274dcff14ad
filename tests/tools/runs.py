"""Directories of runs made without a launcher, and the commands in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import ftrain
from ftrain.checkpoint.catalogue import catalogue
from ftrain.checkpoint.tools.fork import append
from ftrain.cli.app import app
from ftrain.core.journal import CommitBody, Head, RetireBody, RunBody
from ftrain.core.messages import Attempt, Logged
from ftrain.errors import FtrainError
from ftrain.storage import open_storage


@dataclass(frozen=True)
class Done:
    code: int
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def ckpt(*arguments: object) -> Done:
    """`ftrain ckpt ...`, with what it says and ends with."""
    done = CliRunner().invoke(app, ["ckpt", *map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(done.exception, FtrainError):
        return Done(int(done.exception.exit_code), str(done.exception))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Done(done.exit_code, done.output)


def make_run(path: Path, states: Mapping[int, Mapping[str, Any]]) -> Path:
    """A run with a commit for each state, by step."""
    make_run_at(str(path), states)
    return path


def make_run_at(url: str, states: Mapping[int, Mapping[str, Any]]) -> None:
    """The same, in any storage."""
    storage = open_storage(url)
    head = append(storage, Head(), [RunBody("run", "", ftrain.__version__)])
    for step, state in states.items():
        attempt = Attempt(1, step, 1)
        ftrain.save(f"{url}/{attempt.path}", dict(state), step=step)
        digest = hashlib.sha256(storage.read(f"{attempt.path}/manifest.json")).hexdigest()
        metrics = {"loss": Logged(step - 1, 1 / step), "lr": Logged(step - 1, "nan")}
        head = append(storage, head, [CommitBody(attempt, 1, digest, 100, metrics=metrics)])


def retire(run: Path, step: int) -> None:
    """As a run lets go of the commit of this step."""
    _, history = catalogue(str(run)).run
    append(open_storage(str(run)), history.head, [RetireBody(Attempt(1, step, 1))])


def log_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps({"unix_seconds": 1.0, "generation": 1, **row}) for row in rows]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 2))


def files_below(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())

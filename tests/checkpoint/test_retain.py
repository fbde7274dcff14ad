from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.retain import remove, sweep
from ftrain.checkpoint.state.items import TensorItem, item_of
from ftrain.core.messages import Attempt
from ftrain.errors import CheckpointNotFound
from ftrain.storage import PosixStorage
from tests.checkpoint.world import World, save

OLD, NEW, HALF = Attempt(1, 10, 1), Attempt(1, 20, 2), Attempt(1, 20, 3)


def weights() -> list[TensorItem]:
    return [item_of("w", torch.full((1 << 20,), 3.0))]


def restored(storage: PosixStorage, attempt: Attempt) -> bool:
    target = [item_of("w", torch.zeros(1 << 20))]
    Checkpoint.open(storage, attempt.path).read_into(target, 0)
    return bool(target[0].local.eq(3).all())


def test_a_sweep_removes_what_no_commit_needs_of_older_generations_only(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    for attempt in (OLD, NEW, HALF):
        save(storage, attempt, 1, lambda _: weights())
    # The newest generation's attempts may still be committed, by an older coordinator that is only slow.
    storage.create("checkpoints/step-000000000030/g0002-a9/packs/00000/zarr.json", b"in flight")
    assert sweep(storage, [NEW.path], 2) == [OLD.path, HALF.path]
    assert storage.list("checkpoints") == ["step-000000000020", "step-000000000030"]
    assert restored(storage, NEW)
    assert sweep(storage, [NEW.path], 2) == []


def test_a_removed_checkpoint_is_gone_and_removing_it_again_is_no_error(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    save(storage, OLD, 1, lambda _: weights())
    remove(storage, OLD.path)
    remove(storage, OLD.path)
    with pytest.raises(CheckpointNotFound):
        Checkpoint.open(storage, OLD.path)


# Persists the snapshot in the arena behind the descriptor and is killed at the system call whose number it is given.
PERSIST = """
import os, signal, sys
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.writing.persist import persist_slot
from ftrain.core.messages import Attempt
from ftrain.storage import PosixStorage

left = int(sys.argv[1])

def deadly(call):
    def wrapper(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return wrapper

for name in ("open", "write", "fsync", "link", "close", "unlink", "mkdir"):
    setattr(os, name, deadly(getattr(os, name)))
persist_slot(PosixStorage(sys.argv[2]), Attempt(1, 20, 2), 0, Arena(int(sys.argv[3])), 0, lambda: False)
print(left)
"""


def persist_until_killed(storage: PosixStorage, fd: int, calls: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PERSIST, str(calls), storage.url, str(fd)]
    return subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, check=False)


def test_a_saver_killed_anywhere_harms_no_commit_and_is_swept(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    save(storage, OLD, 1, lambda _: weights())
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with World(1) as world:
        world.plan(lambda _: weights())
        world.take(NEW, lambda _: weights())
        whole = persist_until_killed(storage, world.fds[0], 10_000)
        assert whole.returncode == 0, whole.stderr
        total = 10_000 - int(whole.stdout)
        assert sweep(storage, [OLD.path], 2) == [NEW.path]
        for calls in range(0, total, 2):
            assert persist_until_killed(storage, world.fds[0], calls).returncode == -signal.SIGKILL
            with pytest.raises(CheckpointNotFound):
                Checkpoint.open(storage, NEW.path)
            assert restored(storage, OLD)
            sweep(storage, [OLD.path], 2)
            assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
        # The snapshot in the arena is still whole: another saver can persist it.
        assert len(world.persist(storage, NEW)) == 1
    assert (tmp_path / NEW.path).exists()

"""`load`: the state of a checkpoint, in place, from a path that `save` wrote or from a run's directory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from ftrain.checkpoint.garbage import no_collection
from ftrain.checkpoint.job import State
from ftrain.checkpoint.peers import Peers, peers, together
from ftrain.checkpoint.restore import Checkpoint
from ftrain.checkpoint.tracked import REST, Tracked
from ftrain.core.manifest import MANIFEST_PATH
from ftrain.errors import CheckpointNotFound
from ftrain.storage import open_storage
from ftrain.storage.history import read_history


def load(path: str | Path, state: State) -> int:
    """Fill a state in place from the checkpoint at `path`, or from the newest commit of the run at `path`.

    `state` is as for `save`: its tensors are filled where they are, whatever mesh they were saved from, its objects get
    their state, its plain data is replaced. What the checkpoint holds under other names is not read. Returns the number
    of steps that were done when it was saved. Where torch.distributed is initialized, all ranks call this together.
    Raises `CheckpointNotFound`, `MismatchedState` naming the keys with nothing changed, and `CorruptCheckpoint` naming
    tensor, rank, file and offset.
    """
    group = peers()
    with together(group, f"opening {path}"), no_collection():
        checkpoint = open_checkpoint(path)
        source = group.rank if group.rank < checkpoint.world_size else 0
        tracked = Tracked()
        tracked.add_state(state)
        items = tracked.prepare(checkpoint, source)
        asked = {item.spec.key for item in items if not item.spec.private}
        missed = checkpoint.tensors.keys() - asked - _unnamed(checkpoint, tracked.names, source)
    missed -= _asked_by_others(missed, asked, group)
    with together(group, f"loading {path}"), no_collection():
        tracked.fill(checkpoint, group.rank, source, items, checkpoint.tensors.keys() - missed)
    return checkpoint.manifest.attempt.step


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest commit of the run at `path`. Raises as `load`."""
    place = Path(path).absolute()
    run = open_storage(str(place))
    if run.exists(MANIFEST_PATH):
        return Checkpoint.open(open_storage(str(place.parent)), place.name)
    history, _ = read_history(run)
    if history.commits:
        commit = history.commits[-1][1]
        return Checkpoint.open(run, commit.attempt.path, commit.manifest_sha256)
    kind = "a run without a commit" if history.run else "neither a checkpoint nor a run"
    raise CheckpointNotFound(f"{place} is {kind}: there is nothing to load")


def _unnamed(checkpoint: Checkpoint, names: set[str], source: int) -> set[str]:
    """The keys that belong to names that this rank did not give."""
    plain = checkpoint.plain(source).get("tracked")
    known = [name for name in plain if name] if isinstance(plain, dict) else []
    if names.issuperset(plain if isinstance(plain, dict) else ()):
        return set()
    others = tuple(f"{name}." for name in known if name not in names)
    named = tuple(f"{name}." for name in known)
    rest = REST not in names  # what is no object's and no dict's was not asked for
    return {key for key in checkpoint.tensors if key.startswith(others) or (rest and not key.startswith(named))}


def _asked_by_others(missed: set[str], asked: Collection[str], group: Peers) -> set[str]:
    """Which of the keys that this rank misses other ranks ask for: stages of a pipeline hold different tensors."""
    if not any(said != b"" for said in group.exchange(b"x" if missed else b"")):
        return set()
    given = group.exchange(msgspec.json.encode(list(asked)))
    return {key for keys in given for key in msgspec.json.decode(keys, type=list[str])}

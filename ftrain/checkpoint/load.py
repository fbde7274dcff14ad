"""`load`: the state of a checkpoint, in place, from a path that `save` wrote, a run's directory, or another format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ftrain.checkpoint.catalogue import find
from ftrain.checkpoint.exchange import asked_by_others
from ftrain.checkpoint.foreign.opening import open_foreign
from ftrain.checkpoint.garbage import no_collection
from ftrain.checkpoint.loaded import Loaded
from ftrain.checkpoint.peers import Apart, readers, together
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.state.bare import Bare
from ftrain.checkpoint.state.comparison import Comparison, compare
from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.state.selection import Selection
from ftrain.checkpoint.state.source import TensorSource
from ftrain.checkpoint.state.terms import SAME, Rename, Terms, can_cast
from ftrain.checkpoint.state.tracked import REST, Tracked
from ftrain.checkpoint.tools.opening import open_commit
from ftrain.checkpoint.writing.job import State
from ftrain.core.manifest import MANIFEST_PATH
from ftrain.errors import CheckpointNotFound, MismatchedState
from ftrain.storage import open_in_run, open_storage
from ftrain.storage.history import read_history


def load(
    path: str | Path,
    state: State,
    *,
    only: str | Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    dtype: str = SAME,
) -> Loaded:
    """Fill a state in place from the checkpoint at `path`, or from the newest commit of the run at `path`.

    `RUN@1200`, `RUN@-2` and `RUN@NAME` are the commit of step 1200, the one before the newest, and the one pinned so.

    `state` is as for `save`: its tensors are filled where they are, whatever mesh they were saved from, its objects get
    their state, its plain data is replaced. What the checkpoint holds under other names is not read.

    `only`: patterns, as in `fnmatch`, of the names that are to be loaded; one that matches a name matches all below it.
    `rename`: new names by those in the checkpoint, each for itself and all that begins with it and a dot; or a function
    from the one to the other. Optimizer state goes with its parameters in both. Not `strict`: what is not there, or of
    another shape, stays as it is. `dtype="cast"` converts tensors to the dtypes that they have here.

    Returns what this rank loaded and what not, with the number of steps that were done when it was saved. Where
    torch.distributed is initialized, all ranks call this together, each with the names that it has. Raises
    `CheckpointNotFound`, `MismatchedState` naming the keys with nothing changed, and `CorruptCheckpoint` naming tensor,
    rank, file and offset.
    """
    terms = Terms(only, rename, strict, dtype)
    group = readers()
    lacking: list[str] = []
    with together(group, f"opening {path}"), no_collection():
        found = open_source(path)
        tracked = Tracked()
        tracked.add_state(state)
        source = group.rank if isinstance(found, Checkpoint) and group.rank < found.world_size else 0
        selection = _selection(found, terms, source, tracked)
        items = tracked.prepare(selection, source, terms, lacking)
        asked = {item.spec.key for item in items if not item.spec.private}
        missed = {key for key in selection.tensors.keys() - asked if selection.wants(key)}
        missed -= _unnamed(missed, found, terms, tracked.names)
    missed -= missed if isinstance(group, Apart) else asked_by_others(missed, asked, group.exchange)
    with together(group, f"loading {path}"), no_collection():
        own = selection.private_tensors(source) or {}
        compared = compare((item.spec for item in items), selection.tensors, own, selection.tensors.keys() - missed)
        compared.missing += lacking
        report, chosen = _settle(compared, items, found, terms)
        tracked.fill(selection, group.rank, source, chosen, selection.tensors.keys())
    return report


def open_source(path: str | Path) -> TensorSource:
    """The checkpoint of whatever format at `path`. Raises as `load`."""
    if Path(path).is_file():
        found = open_foreign(path)
        if found is None:
            raise CheckpointNotFound(f"{path} is neither a safetensors file nor one of torch's: nothing can be loaded")
        return found
    try:
        return open_checkpoint(path)
    except CheckpointNotFound:
        found = open_foreign(path)
        if found is None:
            raise
        return found


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, the newest commit of the run at `path`, or what `find` takes. Raises as `load`."""
    run = open_storage(str(path))
    if run.exists(MANIFEST_PATH):
        return Checkpoint.open(*open_in_run(path))
    history, _ = read_history(run)
    if history.commits:
        commit = history.commits[-1][1]
        if commit.origin is not None:
            return Checkpoint.open(open_storage(commit.origin.url), commit.origin.path, commit.manifest_sha256)
        return Checkpoint.open(run, commit.attempt.path, commit.manifest_sha256)
    if "@" in str(path) and not history.run:
        return open_commit(find(str(path)))
    kind = "a run without a commit" if history.run else "neither a checkpoint nor a run"
    raise CheckpointNotFound(f"{run.url} is {kind}: there is nothing to load")


def _selection(found: TensorSource, terms: Terms, source: int, tracked: Tracked) -> Selection:
    if isinstance(found, Checkpoint):
        return Selection(found, terms, source)
    # The tensors of one object, whose name they do not have: they are those of the one object that is given.
    holders = tracked.holders if found.names is None else []
    return Selection(Bare(found), terms, source, holders[0] if len(holders) == 1 else "")


def _unnamed(missed: set[str], found: TensorSource, terms: Terms, names: set[str]) -> set[str]:
    """Which of the keys belong to names that this rank did not give."""
    given = tuple(f"{name}." for name in names if name)
    others = {key for key in missed if not key.startswith(given)}
    if REST not in names or found.names is None:
        return others if REST not in names else set()
    # What is no object's and no dict's was asked for.
    known = tuple(f"{terms.here(name)}." for name in found.names if name)
    return {key for key in others if key.startswith(known)}


def _settle(
    compared: Comparison, items: Sequence[TensorItem], found: TensorSource, terms: Terms
) -> tuple[Loaded, list[TensorItem]]:
    """What is to be filled, and what is to be said of it. Raises `MismatchedState` where the terms do not allow it."""
    reshaped = [key for key, (saved, here) in compared.different.items() if saved.shape != here.shape]
    retyped = [key for key, (saved, here) in compared.different.items() if saved.dtype != here.dtype]
    if terms.casts:
        odd = [
            key for key in retyped if not can_cast(compared.different[key][0].dtype, compared.different[key][1].dtype)
        ]
        if odd:
            saved, here = compared.different[odd[0]]
            raise MismatchedState(
                f"{odd[0]} was saved as {saved.dtype}, which does not become {here.dtype} without loss"
            )
        for key in set(retyped) - set(reshaped):
            del compared.different[key]
    elif not terms.strict and set(retyped) - set(reshaped):
        raise MismatchedState(f'{found.url}: {compared}; with dtype="cast" tensors are converted to the dtypes here')
    if terms.strict and str(compared):
        hint = ' (dtype="cast" converts)' if retyped and not terms.casts else ""
        raise MismatchedState(f"{found.url} is of another model or optimizer: {compared}{hint}")
    left = {*compared.missing, *reshaped}
    chosen = [item for item in items if item.spec.key not in left]
    keys = tuple(dict.fromkeys(item.spec.key for item in chosen))
    cast = set(retyped) - left
    return Loaded(
        found.step,
        keys,
        tuple(dict.fromkeys(compared.missing)),
        tuple(compared.unexpected),
        tuple(reshaped),
        tuple(key for key in keys if key in cast),
    ), chosen

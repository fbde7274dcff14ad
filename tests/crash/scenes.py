"""What a run does with its storage, and from which states on."""

from __future__ import annotations

from pathlib import Path

from ftrain.storage.disks import known_disks
from ftrain.storage.posix import PosixStorage
from ftrain.storage.spread import SpreadStorage
from tests.crash.calls import KILL
from tests.crash.judge import STEPS, Expected
from tests.crash.search import Begin, Scene, Search, Stage


def commit(stage: Stage) -> None:
    """A coordinator takes over, and one more step is committed; if that fails, the next one is tried."""
    life = stage.life()
    life.begin()
    step = max((body.attempt.step for _, body in life.history.commits), default=0)
    if not life.commit(step + STEPS):
        life.commit(step + 2 * STEPS)


def retire(stage: Stage) -> None:
    """So many commits that the oldest are retired, and removed where the newest do not refer to them."""
    life = stage.life()
    life.begin()
    step = max((body.attempt.step for _, body in life.history.commits), default=0)
    for number in (1, 2, 3):
        life.commit(step + number * STEPS)


def restore(stage: Stage) -> None:
    """A run starts anew: what the last one left is swept, and the newest commit is restored."""
    life = stage.life()
    life.begin()
    life.restore()


def take_over(stage: Stage) -> None:
    """Another coordinator takes over, commits, and does not know that the first one lives."""
    life = stage.life()
    life.begin()
    step = life.restore()
    life.commit(step + STEPS + 1)


def on_two_disks(root: Path) -> PosixStorage:
    """The run's storage. Rank 1's packs go to the other disk, which whoever opens the run first makes one of it."""
    storage = SpreadStorage(root / "run", [str(root / "disk")])
    if not known_disks(storage):
        storage.check()
    return storage


SCENES: dict[str, Scene] = {"commit": commit, "restore": restore, "retire": retire}


def beginnings(search: Search) -> dict[str, Begin]:
    """States to begin with, all durable: nothing at all, one commit, as many as are kept, and garbage beside them.

    `referred`: the commits refer to packs of one that was retired.
    """
    empty: Begin = ((), Expected())
    one = one_commit(search)
    full = _after(search, commit, one, "full")
    garbage, referred = _with_garbage(search, full, "garbage"), with_references(search)
    return {"empty": empty, "one": one, "full": full, "garbage": garbage, "referred": referred}


def one_commit(search: Search) -> Begin:
    return _after(search, commit, ((), Expected()), "one")


def with_references(search: Search) -> Begin:
    return _after(search, retire, one_commit(search), "referred")


def _after(search: Search, scene: Scene, begin: Begin, name: str) -> Begin:
    run = search.play(scene, begin, name=name)
    *_, (disk, promised) = run.moments()
    return disk.now(), promised


def _with_garbage(search: Search, begin: Begin, name: str) -> Begin:
    """As a power cut leaves it right before the manifest of an attempt was written."""
    calls = search.play(commit, begin, name=name).recorder
    links = [number for number, kind in enumerate(calls.kinds) if kind == "link"]
    run = search.play(commit, begin, {links[-2]: KILL}, name=name)
    *_, (disk, promised) = run.moments()
    return disk.now(), promised

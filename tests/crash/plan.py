"""Which scenes are searched for which faults, and how many states of each are judged."""

from __future__ import annotations

from tests.crash import scenes
from tests.crash.bugs import BUGS, planted
from tests.crash.judge import Expected
from tests.crash.search import Begin, Search, searching
from tests.crash.store import StoreSearch


def search_all(search: Search, states: int) -> None:
    """Every class of faults in every scene; in all together about so many different states are judged.

    Small scenes are searched whole: every state of every moment. Of large ones, and of double faults, states are drawn.
    """
    begins = scenes.beginnings(search)
    empty, one, full, garbage, referred = (begins[name] for name in ("empty", "one", "full", "garbage", "referred"))
    commit, restore, retire, take_over = scenes.commit, scenes.restore, scenes.retire, scenes.take_over
    share = states // 100
    for name, begin in begins.items():
        search.crash(f"restore, {name}: a crash", restore, begin)
    search.crash("commit, empty: a crash", commit, empty)
    search.crash("commit, one: a crash", commit, one)
    search.crash("commit, garbage: a crash", commit, garbage, 10 * share)
    search.crash("commit, referred: a crash", commit, referred, 4 * share)
    search.crash("retire, empty: a crash", retire, empty, 4 * share)
    search.crash("retire, full: a crash", retire, full, 8 * share)
    search.overtaken("fence, commit: overtaken, a crash", commit, take_over, one, 10 * share)
    search.overtaken("fence, retire: overtaken, a crash", retire, take_over, full, 4 * share, runs=40)
    search.kills("commit: killed, then a crash", commit, take_over, one, 8 * share, runs=100)
    search.kills("retire: killed, then a crash", retire, take_over, full, 4 * share, runs=40)
    search.errors("commit: an error, a crash", commit, one, 14 * share)
    search.errors("restore: an error, a crash", restore, garbage, 2 * share)
    search.errors("retire: an error, a crash", retire, full, 6 * share, runs=60)
    search.errors("fence: an error, a crash", take_over, garbage, 4 * share, runs=60)
    search.two_errors("commit: two errors, a crash", commit, one, 8 * share, runs=200)
    search.two_errors("retire: two errors, a crash", retire, full, 2 * share, runs=20)
    search.crash_in_recovery("commit: a crash, a crash", commit, take_over, one, 4 * share, runs=80)
    search.crash_in_recovery("retire: a crash, a crash", retire, take_over, full, 2 * share, runs=20)
    left = max(0, states - sum(search.report.distinct.values()))
    search.crash_in_recovery("commit: a crash, an error, a crash", commit, take_over, one, left, 120, errors=True)


def search_disks(search: Search, states: int) -> None:
    """The same on two disks, in each class about a tenth of so many states."""
    nothing: Begin = ((), Expected())
    commit, retire, take_over = scenes.commit, scenes.retire, scenes.take_over
    one, share = scenes.one_commit(search), states // 10
    search.crash("disks, begun: a crash", commit, nothing, share)
    search.errors("disks, begun: an error, a crash", commit, nothing, share, runs=60)
    search.crash("disks, commit: a crash", commit, one, share)
    search.crash("disks, retire: a crash", retire, one, share)
    search.errors("disks, links: an error, a crash", commit, one, share, kinds=("symlink",))
    search.errors("disks, commit: an error, a crash", commit, one, share, runs=60)
    search.errors("disks, retire: an error, a crash", retire, one, share, runs=8)
    search.kills("disks, commit: killed, then a crash", commit, take_over, one, share, runs=20)
    search.overtaken("disks, fence: overtaken, a crash", commit, take_over, one, share, runs=10)
    search.crash_in_recovery("disks, commit: a crash, a crash", commit, take_over, one, share, runs=10)


def search_store(search: StoreSearch, pairs: int) -> None:
    """On an object store: every single fault of every scene, every second one after it, and `pairs` of errors."""
    commit, take_over = scenes.commit, scenes.take_over
    one, full = search.begin(commit), search.begin(commit, commit)
    for name, scene in scenes.SCENES.items():
        search.crash(f"store, {name}: a crash", scene, full)
        search.errors(f"store, {name}: an error, a crash", scene, full)
    search.overtaken("store, fence: overtaken, a crash", commit, take_over, one)
    search.kills("store, commit: killed, then a crash", commit, take_over, one)
    search.crash_in_recovery("store, commit: a crash, a crash", commit, take_over, one, with_errors=False)
    search.crash_in_recovery(
        "store, retire: a crash, an error, a crash", scenes.retire, take_over, full, with_errors=True
    )
    search.errors("store, commit: two errors, a crash", commit, one, 2, pairs)
    search.errors("store, retire: two errors, a crash", scenes.retire, full, 2, pairs)


def find(bug: str, seed: int = 0) -> list[str]:
    """The violations that a search finds with this bug planted, no more than the first."""
    store = StoreSearch(seed, first_violation=True, progress=lambda _: None)
    if BUGS[bug][1] == "store":
        with planted(bug):
            store.errors(bug, scenes.commit, store.begin(scenes.commit))
        return store.report.violations
    with searching(seed=seed, first_violation=True, moment_max=32) as search, planted(bug):
        search_for(search, BUGS[bug][1])
        return search.report.violations


def search_for(search: Search, fault: str) -> None:
    """A small sample of one class of faults, in which a planted bug shows soon."""
    one = scenes.one_commit(search)
    match fault:
        case "crash":
            search.crash(fault, scenes.commit, one, 300)
        case "referred":
            search.crash(fault, scenes.take_over, scenes.with_references(search), 200)
        case "overtaken":
            search.overtaken(fault, scenes.commit, scenes.take_over, one, 100, runs=25)
        case "killed":
            search.kills(fault, scenes.commit, scenes.restore, one, 800, kinds=("fsync directory",))
        case _:
            search.errors(fault, scenes.commit, one, 400, runs=25, kinds=(fault,))

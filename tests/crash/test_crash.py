"""A small sample of what `python -m tests.crash` searches, and each planted bug."""

from __future__ import annotations

import pytest

from ftrain.core import frames
from ftrain.core.codec import Codec
from tests.crash import life, scenes
from tests.crash.bugs import BUGS
from tests.crash.judge import Expected
from tests.crash.plan import find
from tests.crash.search import searching
from tests.crash.store import StoreSearch


@pytest.mark.parametrize("scene", scenes.SCENES)
def test_after_a_power_cut_at_any_moment_the_old_or_the_new_checkpoint_is_whole(scene: str) -> None:
    with searching(moment_max=64) as search:
        begin = scenes.beginnings(search)["garbage"]
        search.crash(scene, scenes.SCENES[scene], begin, 60)
        assert not search.report.violations
        assert search.report.distinct[scene] > 20


def test_after_an_error_or_a_kill_and_a_power_cut_the_run_goes_on() -> None:
    with searching(moment_max=16) as search:
        one = scenes.one_commit(search)
        search.errors("errors", scenes.commit, one, 60, runs=12)
        search.kills("kills", scenes.commit, scenes.take_over, one, 60, runs=8)
        search.crash_in_recovery("twice", scenes.commit, scenes.take_over, one, 40, runs=4)
        assert not search.report.violations


def test_a_coordinator_that_was_overtaken_commits_nothing_more() -> None:
    with searching(moment_max=16) as search:
        search.overtaken("fence", scenes.commit, scenes.take_over, scenes.one_commit(search), 60, runs=12)
        assert not search.report.violations


def test_on_an_object_store_too_every_single_fault_leaves_a_whole_checkpoint() -> None:
    search = StoreSearch(progress=lambda _: None)
    one = search.begin(scenes.commit)
    for scene in scenes.SCENES.values():
        search.crash("crash", scene, one)
    search.errors("errors", scenes.commit, one)
    search.overtaken("fence", scenes.commit, scenes.take_over, one)
    assert not search.report.violations


def test_a_compressed_checkpoint_is_as_whole_after_a_power_cut_an_error_or_a_kill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(life, "CODEC", Codec.parse("blosc-zstd"))
    monkeypatch.setattr(frames, "PLAIN_BYTES_MAX", 64)
    with searching(moment_max=16) as search:
        begin = scenes.beginnings(search)["referred"]
        search.crash("commit", scenes.commit, begin, 60)
        search.errors("errors", scenes.commit, begin, 60, runs=12)
        search.kills("kills", scenes.commit, scenes.take_over, begin, 60, runs=4)
        assert not search.report.violations
    with searching(moment_max=4, opens=scenes.on_two_disks) as search:
        search.crash("on two disks", scenes.commit, scenes.one_commit(search), 40)
        assert not search.report.violations
    store = StoreSearch(progress=lambda _: None)
    one = store.begin(scenes.commit)
    store.crash("crash", scenes.commit, one)
    store.errors("errors", scenes.commit, one)
    assert not store.report.violations


def test_on_two_disks_too_a_power_cut_an_error_or_a_kill_leaves_a_whole_checkpoint() -> None:
    with searching(moment_max=4, opens=scenes.on_two_disks) as search:
        search.crash("taken", scenes.commit, ((), Expected()), 80)
        one = scenes.one_commit(search)
        search.crash("crash", scenes.retire, one, 40)
        search.errors("errors", scenes.commit, one, 30, runs=6)
        search.errors("links", scenes.commit, one, 30, kinds=("symlink",))
        search.kills("kills", scenes.commit, scenes.take_over, one, 20, runs=4)
        search.crash_in_recovery("twice", scenes.commit, scenes.take_over, one, 20, runs=2)
        assert not search.report.violations


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    assert find(bug), f"nothing was found with: {bug}"

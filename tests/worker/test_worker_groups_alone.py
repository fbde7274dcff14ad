"""A rank that trains before it meets the others, and modules that a step has left in the middle."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ftrain.worker import groups
from ftrain.worker.local_group import LocalGroup
from tests.worker.ranks import ranks

MEETINGS = "tests.worker.group_meetings"


@pytest.mark.parametrize("rank", [0, 2])
def test_every_collective_alone_gives_back_what_it_was_given(tmp_path: Path, rank: int) -> None:
    with ranks(tmp_path, 3, f"{MEETINGS}:every_collective", only=rank) as run:
        assert run.hear(rank) == ("done",)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("kind", ["ddp", "ddp unused", "ddp views", "fsdp"])
def test_step_that_raised_is_done_again_to_the_same_bits(tmp_path: Path, kind: str, where: str, at: int) -> None:
    with ranks(tmp_path, 3, f"{MEETINGS}:recovered", only=1, kind=kind, where=where, at=at) as run:
        assert run.hear(1) == ("equal",)


def test_module_without_a_way_out_is_refused(tmp_path: Path) -> None:
    with ranks(tmp_path, 3, f"{MEETINGS}:unrecoverable", only=0) as run:
        said = {what: rest for what, *rest in (run.hear(0) for _ in range(4))}
    assert {rest[0] for rest in said.values()} == {"Unrecoverable"}
    assert "static_graph" in said["static"][1]
    assert "a peer has 2 DDP modules, this rank has 1" in said["other modules"][1]
    assert "not one of the 6 parameters" in said["other parameters"][1]
    assert "no such name in this torch" in said["a name"][1]


def test_destructor_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's joins threads, which may wait for a peer. The swap that lets a group go is done in time all the same."""
    hangs, ends = threading.Event(), threading.Event()

    class Group(LocalGroup):
        def __del__(self) -> None:
            hangs.set()
            ends.wait(60)

    monkeypatch.setattr(groups, "LET_GO_SECONDS", 0.05)
    before = [Group(0, 1, "hanging")]
    try:
        groups._let_go(before)
        assert hangs.is_set()
        assert not before
        assert not ends.is_set()
    finally:
        ends.set()

"""Groups under living ranks: revoked, connected again, met by who is new."""

from __future__ import annotations

import gc
import os
import socket
import threading
import weakref
from pathlib import Path

import pytest

from ftrain.errors import PeerLost
from ftrain.worker import gloo_sockets
from ftrain.worker.ordinary_group import beside
from tests.worker.harness import PATIENCE_SECONDS
from tests.worker.ranks import ranks

MEETINGS = "tests.worker.group_meetings"


@pytest.mark.parametrize("how", ["whole", "mesh", "reducer", "chain"])
def test_ranks_blocked_by_a_stopped_one_are_woken_by_a_revoke(tmp_path: Path, how: str) -> None:
    with ranks(tmp_path, 3, f"{MEETINGS}:blocked", how=how) as run:
        assert run.hear(0) == run.hear(1) == ("waits",)
        run.wait_stopped(2)
        run.wait_blocked(0)
        run.wait_blocked(1)
        run.revoke(0, 1)
        for rank in (0, 1):
            word, message = run.hear(rank)
            assert word == "raised"
            assert "gloo" in message
        run.name_generation(0, 1)
        for rank in (0, 1):
            word, raised = run.hear(rank)
            assert word == "later"
            assert len(raised) == 3
            assert all("generation 1 was revoked" in message for message in raised)


@pytest.mark.parametrize("broken", ["sender", "receiver"])
def test_ranks_whose_connection_broke_in_the_middle_of_a_message_are_woken_by_a_revoke(
    tmp_path: Path, broken: str
) -> None:
    with ranks(tmp_path, 2, f"{MEETINGS}:in_the_middle", broken=broken) as run:
        assert run.hear_all() == [("waits",)] * 2
        run.wait_blocked(0)
        run.wait_blocked(1)
        run.revoke(0, 1)
        for word, message in run.hear_all():
            assert word == "raised"
            assert "all connections were shut down" in message


def test_revoke_of_one_rank_wakes_the_one_that_waits_for_it(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, f"{MEETINGS}:waiting") as run:
        run.wait_blocked(0)
        assert run.hear(1) == ("idle",)
        run.revoke(1)
        assert run.hear(0)[0] == "raised"


def test_idle_groups_are_revoked_and_connected_again(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, f"{MEETINGS}:idle") as run:
        assert run.hear_all() == [("idle",)] * 2
        run.revoke(0, 1)
        run.name_generation(0, 1)
        assert [len(raised) for _, raised in run.hear_all()] == [2, 1]
        assert run.hear_all() == [("sum", 2.0)] * 2
        run.end()


def test_hundred_swaps_leave_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    times = 100
    with ranks(tmp_path, 2, f"{MEETINGS}:swapped", times=times) as run:
        for _ in range(times):
            run.name_generation(0, 1)
        early, late = zip(*((run.hear(rank), run.hear(rank)) for rank in range(2)), strict=True)
        assert early == late
        run.end()


def test_connecting_with_a_peer_that_does_not_come_is_given_up_when_revoked(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, f"{MEETINGS}:interrupted") as run:
        run.name_generation(0, 1)
        for generation in (2, 3):
            assert run.hear(0) == ("connecting",)
            run.revoke(0)
            word, message = run.hear(0)
            assert word == "raised"
            assert f"generation {generation} was revoked" in message
            run.name_generation(0, 1)
        assert run.hear_all() == [("connected",)] * 2
        run.end()


def test_revoke_counts_for_its_generation_whenever_it_comes(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, f"{MEETINGS}:overtaken") as run:
        assert run.hear_all() == [("ready",)] * 2
        run.revoke(0, 1, generation=2)
        run.name_generation(0, 1)
        assert all("generation 2 was revoked" in message for _, message in run.hear_all())
        run.name_generation(0, 1)
        assert run.hear_all() == [("connected", 3)] * 2
        run.revoke(0, 1, generation=2)
        run.name_generation(0, 1)
        assert run.hear_all() == [("still connected", False)] * 2
        run.end()


def test_connection_that_nobody_answers_is_left_to_its_thread() -> None:
    answered = threading.Event()
    ended = threading.Event()

    def connect() -> None:
        answered.wait(PATIENCE_SECONDS)
        ended.set()

    def check() -> None:
        raise PeerLost("revoked")

    with pytest.raises(PeerLost, match="revoked"):
        beside(connect, check)
    assert not ended.is_set()
    answered.set()
    assert ended.wait(PATIENCE_SECONDS)


def test_error_of_making_a_group_is_raised_where_it_was_asked_for() -> None:
    def connect() -> None:
        raise ConnectionError("no route")

    with pytest.raises(ConnectionError, match="no route"):
        beside(connect, lambda: None)


def test_error_of_a_group_that_is_given_up_keeps_no_connection_alive() -> None:
    class Connection:
        pass

    kept: list[weakref.ref[Connection]] = []

    def make() -> None:
        connection = Connection()
        kept.append(weakref.ref(connection))
        raise OSError("the peer is gone")

    def check() -> None:
        if kept:
            raise PeerLost("revoked")

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(PeerLost):
            beside(make, check)
        for thread in threading.enumerate():
            if thread.name == "ftrain-connect":
                thread.join()
        assert kept[0]() is None
    finally:
        gc.enable()


def test_groups_made_after_a_recovery_meet(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, f"{MEETINGS}:met_later") as run:
        assert run.hear(0) == ("met",)
        run.wait_killed(1)
        run.replace(1)
        said = run.hear_all()
        assert said[0] == said[1]
        assert said[0][0] == "summed"
        run.end()


def test_group_that_a_newcomer_has_not_made_is_named(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, f"{MEETINGS}:unequal") as run:
        run.wait_killed(1)
        run.replace(1)
        word, message = run.hear(0)
        assert word == "Unrecoverable"
        assert "rank 1 has no group '1' of ranks [0, 1] in generation 2" in message
        run.revoke(1)


def test_sockets_of_others_are_left_alone(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, f"{MEETINGS}:beside_strangers") as run:
        assert run.hear_all() == [("untouched",)] * 2
        run.name_generation(0, 1)
        run.end()


def test_descriptor_that_is_another_socket_by_now_is_left_alone() -> None:
    one, other = socket.socketpair()
    with one, other:
        inode = os.fstat(one.fileno()).st_ino
        assert not gloo_sockets.shut_down_socket(one.fileno(), inode + 1)
        one.sendall(b"still there")
        assert other.recv(20) == b"still there"
        assert gloo_sockets.shut_down_socket(one.fileno(), inode)
        assert other.recv(20) == b""
    assert not gloo_sockets.shut_down_socket(one.fileno(), inode)

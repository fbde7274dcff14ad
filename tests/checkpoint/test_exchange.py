"""Shared state from a living replica, and a snapshot from the arenas of all ranks: bitwise, between real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.ranks import together

HERE = "tests.checkpoint.exchanges"


@pytest.mark.parametrize("run_bytes", [0, 64])
def test_newcomer_gets_everything_from_a_ddp_replica_that_lives(tmp_path: Path, run_bytes: int) -> None:
    shards = together(tmp_path, 2, f"{HERE}:live", parallel="ddp", pairs=[(0, 1)], run_bytes=run_bytes)
    assert len(set(shards)) == 1


def test_one_replica_serves_several_newcomers(tmp_path: Path) -> None:
    pairs = [(3, 0), (3, 2)]
    shards = together(tmp_path, 4, f"{HERE}:live", parallel="ddp", pairs=pairs, processes=1)
    assert len(set(shards)) == 1


def test_newcomers_get_their_shards_from_the_other_half_of_an_hsdp_mesh(tmp_path: Path) -> None:
    shards = together(tmp_path, 4, f"{HERE}:live", parallel="hsdp", pairs=[(0, 2), (3, 1)])
    assert shards[0] == shards[2] != shards[1] == shards[3]


def test_fully_sharded_ranks_are_no_replicas_of_each_other(tmp_path: Path) -> None:
    assert len(set(together(tmp_path, 4, f"{HERE}:live", parallel="fsdp", pairs=[]))) == 4


@pytest.mark.parametrize("run_bytes", [0, 64])
def test_tensors_of_every_sort_arrive_bit_by_bit(tmp_path: Path, run_bytes: int) -> None:
    together(tmp_path, 4, f"{HERE}:odd", run_bytes=run_bytes)


def test_newcomer_of_another_script_is_refused_on_both_sides(tmp_path: Path) -> None:
    sender, newcomer = together(tmp_path, 2, f"{HERE}:different")
    assert "no replicas of each other: model.0.weight" in newcomer
    assert "MismatchedState: rank 1 cannot take over the state of rank 0" in sender


@pytest.mark.parametrize(("parallel", "world_size", "lost"), [("ddp", 2, [1]), ("fsdp", 2, [0])])
@pytest.mark.parametrize("processes", [0, 1])
def test_two_ranks_go_back_to_their_arenas(
    tmp_path: Path, parallel: str, world_size: int, lost: list[int], processes: int
) -> None:
    together(tmp_path, world_size, f"{HERE}:arenas", parallel=parallel, lost=lost, processes=processes)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("run_bytes", [0, 64])
def test_four_ranks_go_back_to_their_arenas(tmp_path: Path, parallel: str, run_bytes: int) -> None:
    together(tmp_path, 4, f"{HERE}:arenas", parallel=parallel, lost=[1, 2], run_bytes=run_bytes)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("unsealed", "Unavailable: .* rank 1: slot 1 of the arena holds no sealed snapshot"),
        ("older", "Unavailable: .* rank 0: slot 1 of the arena of rank 0 of 2 holds"),
        ("other script", "MismatchedState: .* rank 0: the checkpoint has nothing tracked as 'more'"),
        ("other shape", "MismatchedState: .* of another model, optimizer or mesh: model.0"),
    ],
)
def test_arenas_that_do_not_hold_it_are_refused_on_all_ranks_alike(tmp_path: Path, case: str, said: str) -> None:
    found = together(tmp_path, 2, f"{HERE}:no_snapshot", case=case)
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=said):
        raise ValueError(found[0])


def test_bit_turned_over_between_arenas_is_noticed_on_all_ranks(tmp_path: Path) -> None:
    found = together(tmp_path, 2, f"{HERE}:damaged", of="arenas")
    assert found[0] == found[1]
    assert "CorruptCheckpoint: what rank 1 received from rank 0 does not match its checksum" in found[0]


def test_bit_turned_over_on_the_way_from_a_replica_is_noticed(tmp_path: Path) -> None:
    sender, receiver = together(tmp_path, 2, f"{HERE}:damaged", of="live")
    assert sender == ""
    assert "CorruptCheckpoint: the state that came from the memory of rank 0" in receiver

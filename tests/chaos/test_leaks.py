"""What tells a leak from what only comes and goes; `python -m tests.chaos --leaks` is the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.leaks import GROWTH_KIB_MAX, RECORDER, RECORDS, SAMPLES_MIN, Held, Leaks
from tests.chaos.plan import Shape
from tests.chaos.run import Chaos
from tests.launching.harness import clusters

FAULTS = 300


def looks(**grows: float) -> Leaks:
    """Every 5 faults; what grows does so by this much a fault, beside what comes and goes."""
    samples = [
        Held(
            faults,
            7,
            14 + faults % 2 + int(faults * grows.get("descriptors", 0)),
            6 + faults % 3 + int(faults * grows.get("threads", 0)),
            2 + int(faults * grows.get("shared", 0)),
            # It fills up in the beginning, and takes one leap later.
            270 + min(faults, 60) / 20 + (faults > 200) + faults * grows.get("resident_kib", 0) / 1024,
        )
        for faults in range(5, FAULTS, 5)
    ]
    return Leaks({"rank 0": samples}, [3] * len(samples))


def looked_at(chaos: Chaos) -> Leaks:
    leaks = Leaks()
    chaos.run(lambda number: leaks.look(chaos, number))
    return leaks


def test_process_that_only_fills_up_does_not_leak() -> None:
    assert looks().found() == []


@pytest.mark.parametrize("what", ["descriptors", "threads", "shared"])
def test_one_more_in_fifty_faults_is_a_leak(what: str) -> None:
    [line] = looks(**{what: 0.02}).found()
    assert what in line


def test_memory_that_grows_with_each_fault_is_a_leak() -> None:
    assert looks(resident_kib=GROWTH_KIB_MAX / 2).found() == []
    [line] = looks(resident_kib=GROWTH_KIB_MAX * 2).found()
    assert "of resident memory" in line


def test_segments_that_are_left_behind_are_a_leak() -> None:
    leaks = Leaks({}, [3] * SAMPLES_MIN + [4] * SAMPLES_MIN)
    assert leaks.found() == ["/dev/shm: 3 segments, then 4"]


def test_few_looks_tell_nothing() -> None:
    leaks = looks(descriptors=1)
    leaks.samples["rank 0"] = leaks.samples["rank 0"][:12]
    assert leaks.found() == []


def test_spared_rank_lives_through_all_recoveries_and_is_looked_at(tmp_path: Path) -> None:
    for cluster in clusters(tmp_path):
        chaos = Chaos(
            cluster,
            1,
            4,
            shape=Shape(1, 2, spared=0),
            kinds=("kill a rank",),
            environment={RECORDER: str(RECORDS)},
        )
        leaks = looked_at(chaos)
        assert chaos.done.total() >= 2
        assert {name: len({one.pid for one in looks}) for name, looks in leaks.samples.items()} == {
            "launcher 0": 1,
            "rank 0": 1,
        }
        survivor = leaks.samples["rank 0"]
        assert [one.faults for one in survivor] == [1, 2, 3, 4]
        assert all(one.resident_mib > 1 and one.descriptors and one.threads and one.shared for one in survivor)
        assert sum("rank 0" in line for line in leaks.table()) == 1
        assert cluster.nothing_left()

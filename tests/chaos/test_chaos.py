"""A small chaos; `python -m tests.chaos` is the large one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.leaks import Leaks
from tests.chaos.plan import KINDS, Shape, plan
from tests.chaos.report import report
from tests.chaos.run import Chaos, ends_as_unhurt
from tests.launching.harness import clusters

SMALL = ("kill a rank", "kill two ranks at once", "stop a rank", "kill a nursery", "cut a link", "break a link")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_that_is_hurt_at_random_ends_as_the_unhurt_one(tmp_path: Path, parallel: str) -> None:
    for cluster in clusters(tmp_path):
        chaos = Chaos(cluster, 7, 8, parallel, kinds=SMALL)
        chaos.run()
        found = report(chaos, Leaks(), 0.0, ends_as_unhurt(chaos))
        assert found.good, f"{found.text()}\n{chaos.told()}"
        assert found.faults >= 6
        assert found.recoveries >= 3


def test_plan_is_the_same_for_the_same_seed_and_has_every_kind_that_fits() -> None:
    hosted, alone = Shape(disk=True), Shape(alone=True)
    assert plan(3, 500, hosted) == plan(3, 500, hosted) != plan(4, 500, hosted)
    assert plan(3, 500, hosted)[:100] == plan(3, 100, hosted)
    kinds = {fault.kind for shape in (hosted, alone) for fault in plan(3, 2000, shape)}
    assert kinds == set(KINDS)
    assert any(not fault.steps for fault in plan(3, 20, hosted))
    assert all(fault.ranks[0] != 0 for fault in plan(3, 500, Shape(1, 2, spared=0)))

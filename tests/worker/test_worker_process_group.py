"""The swappable group under everything that torch puts on top of a process group."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from ftrain.core.page import Collective, Field
from tests.worker.harness import agent, records


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_inner_group_swapped_between_steps_changes_nothing(tmp_path: Path, parallel: str) -> None:
    for swap_at in (3, 99):
        with agent(tmp_path, checkpoints=False) as node:
            node.start("tests.worker.groupings:swapped", {"parallel": parallel, "swap_at": swap_at})
            assert node.end() == [0, 0]
    for rank in (0, 1):
        swapped, plain = records(tmp_path, f"swapped-{rank}")
        assert swapped["digest"] == plain["digest"]


def test_all_collectives_work_over_the_group_on_loopback_only(tmp_path: Path) -> None:
    with agent(tmp_path, checkpoints=False) as node:
        node.start("tests.worker.groupings:everything", {})
        assert node.end() == [0, 0]
        page = node.workers[0].page
        assert page.load(Field.COLLECTIVE_SEQ) > 30
        assert page.load(Field.COLLECTIVE_KIND) == Collective.BARRIER
    for rank in (0, 1):
        (done,) = records(tmp_path, f"done-{rank}")
        assert done["listening"]
        assert all(ipaddress.ip_address(address).is_loopback for address in done["listening"]), done

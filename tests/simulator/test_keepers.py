"""Schedules in which nodes are lost again and again: neighbours' copies serve, and never those of another past."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from ftrain.core import copying, keeping
from ftrain.core.membership import FormationPolicy
from tests.simulator.plan import Plan, draw
from tests.simulator.world import simulate

SCHEDULES = 120
HUNT = range(1040, 5000)  # for a planted bug, which takes three losses at the right moments: to the first that shows it
FAULT_EVENTS = (150, 1500)


def losing_nodes(seed: int) -> Plan:
    """A schedule of several nodes, all needed, of which some crash."""
    rng = Random(seed)
    plan = draw(seed)
    nodes = rng.choice((2, 3))
    formation = FormationPolicy(nodes, nodes, wait_seconds=10_000.0, last_call_seconds=1.0)
    checkpoint = replace(plan.policy.checkpoint, every_steps=0, every_seconds=5.0, snapshot_steps=2)
    kinds = rng.choices(("crash agent", "kill worker", "break link", "crash coordinator"), (5, 2, 1, 0.5), k=6)
    faults = tuple(sorted((rng.randint(*FAULT_EVENTS), kind) for kind in kinds))
    return replace(
        plan,
        nodes=nodes,
        processes=1,
        spares=0,
        total_steps=0,
        joins=True,
        policy=replace(plan.policy, formation=formation, checkpoint=checkpoint),
        faults=faults,
        aimed={},
        fault_events=FAULT_EVENTS[1],
        peers=True,
    )


def violations() -> tuple[list[str], Counter[str]]:
    found: list[str] = []
    counted: Counter[str] = Counter()
    for seed in range(SCHEDULES):
        outcome = simulate(losing_nodes(seed))
        counted.update(outcome.faults)
        if outcome.violation:
            found.append(f"{seed}: {outcome.violation}")
    return found, counted


def test_lost_nodes_go_on_from_what_their_neighbours_keep() -> None:
    found, counted = violations()
    assert found == []
    assert counted["fetched for live"] > 40
    assert counted["fetched for arena"] > 10


def test_copies_of_a_past_that_was_given_up_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = keeping.began

    def began(kept: keeping.Kept, generation: int, line: Any) -> keeping.Kept:
        begun = real(kept, generation, line)
        return replace(begun, ranks=kept.ranks) if begun is not kept else kept

    monkeypatch.setattr(keeping, "began", began)
    # Of snapshots that replicas make needless, too: it is among those that it shows.
    monkeypatch.setattr(copying, "is_sent", lambda _state: True)
    assert any(simulate(losing_nodes(seed)).violation for seed in HUNT)

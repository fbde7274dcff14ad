"""Links between hosts that are cut, both ways and one way, and healed: one history, and the training ends as unhurt.

The hosts are network namespaces (`tests.recovery.namespaces`), the rest is real. Runs are slow to start and quick to
recover, so each is hurt several times.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ftrain.storage import open_storage
from ftrain.storage.history import read_history
from tests.launching.harness import FTRAIN, Cluster, Launcher, wait_for
from tests.recovery import held_launcher, namespaces
from tests.recovery.account import Job, arguments
from tests.recovery.held_launcher import MANIFEST, PACK, Holds
from tests.recovery.namespaces import BOTH, Network, Way

PORT = 29400
LEASE_SECONDS = 3
PATIENCE_SECONDS = 240.0  # three launchers start at the same time
STEPS = 240
CUT_OFF = "cut off: nothing was heard of the coordinator"
LACKING = namespaces.lacking()

pytestmark = pytest.mark.skipif(bool(LACKING), reason=LACKING)


@dataclass
class Run:
    """A training of two nodes on hosts 0 and 1, which are given no more than an endpoint."""

    cluster: Cluster
    network: Network
    nnodes: object = 2
    coordinator: int = 0  # the host that it is on
    every: object = 40
    more: tuple[object, ...] = ()
    steps: int = STEPS
    nodes: list[Launcher] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.job = Job(self.cluster.path / "job")
        secret = self.cluster.path / "secret.pem"
        assert self.cluster.start([*FTRAIN, "secret", str(secret)]).wait() == 0
        endpoint = f"{self.network.host_name(self.coordinator)}:{PORT}"
        self.flags = ("--nnodes", self.nnodes, "--rdzv-endpoint", endpoint, "--secret", secret)
        self.flags += ("--lease", f"{LEASE_SECONDS}s", "--checkpoint-every", self.every, *self.more)

    def start(self, command: list[str] | None = None, environment: dict[str, str] | None = None) -> None:
        for rank in (0, 1):
            own = ("launch", "--node-rank", rank, *self.flags, *arguments(self.job, "ddp", self.steps))
            self.nodes.append(self._on(rank, [*(command or FTRAIN), *map(str, own)], environment))

    def start_unhurt(self) -> Job:
        """The same training, of two ranks on one host, which nothing happens to."""
        job = Job(self.cluster.path / "unhurt")
        flags = ("launch", "--nproc-per-node", 2, "--checkpoint-every", "off")
        own = (*flags, *arguments(job, "ddp", self.steps, "--pause", 0))
        self.nodes.append(self._on(2, [*FTRAIN, *map(str, own)], None))
        return job

    def start_coordinator(self) -> Launcher:
        own = ("coordinator", *self.flags, "--run-dir", self.job.run_dir)
        return self._on(self.coordinator, [*FTRAIN, *map(str, own)], None)

    def _on(self, host: int, command: list[str], environment: dict[str, str] | None) -> Launcher:
        return self.cluster.start(self.network.inside(host, command), environment)

    def comes_to(self, steps: int, rank: int = 0) -> None:
        self.until(lambda: self.job.done(rank) >= steps, f"step {steps}")

    def goes_on(self, steps: int = 3) -> None:
        """Until both ranks have done that many more."""
        wanted = max(self.job.done(0), self.job.done(1)) + steps
        self.until(lambda: min(self.job.done(0), self.job.done(1)) >= wanted, f"step {wanted}")

    def until(self, condition: Any, what: str) -> None:
        def ended() -> bool:
            return any(node.process.poll() is not None for node in self.nodes[:2])

        wait_for(lambda: condition() or ended(), f"{what}:\n{self.text}", PATIENCE_SECONDS)
        assert condition(), f"a launcher ended before {what}:\n{self.text}"

    @property
    def text(self) -> str:
        return "\n".join(node.text for node in self.nodes)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.job.run_dir / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [event for event in map(json.loads, filter(_is_whole, lines)) if event["event"] == kind]

    def generations(self) -> list[int]:
        return [body["generation"] for body in self.job.journal("generation")]

    def pids(self) -> list[set[int]]:
        """By rank, the processes that did its steps."""
        return [{step.pid for step in self.job.steps() if step.rank == rank} for rank in (0, 1)]

    def cut(self, *ways: Way) -> None:
        """Cut node 1 off, until it stands still by itself, and node 0 goes on without it or waits for it."""
        stood, lost = self._stood_still(), self.losses()
        began = time.monotonic()
        self.network.cut(1, ways or BOTH)
        self.until(lambda: self._stood_still() > stood, "node 1 stands still")
        still = time.monotonic() - began
        self.until(lambda: self.losses() > lost, "the lease of node 1")
        names = ", ".join(way.name.lower() for way in ways or BOTH)
        over = time.monotonic() - began
        print(f"cut ({names}): node 1 stands still after {still:.1f} s, it is lost after {over:.1f} s", _load())

    def heal(self) -> None:
        """Heal the link, until both ranks have done another step."""
        began = time.monotonic()
        self.network.heal(1)
        self.goes_on(1)
        print(f"healed: both ranks have done another step after {time.monotonic() - began:.1f} s", _load())

    def _stood_still(self) -> int:
        return self.nodes[1].text.count(CUT_OFF)

    def losses(self) -> int:
        """How often the coordinator has given up waiting for somebody."""
        return len(self.events("interruption"))

    def ends_well(self) -> None:
        assert not any(node.wait(PATIENCE_SECONDS) for node in self.nodes), self.text
        assert self.cluster.nothing_left()
        self.has_one_history()

    def has_one_history(self) -> None:
        """Each record follows the one before it, each generation and each commit too, and there is one end."""
        read_history(open_storage(str(self.job.run_dir)))  # each names the one before it by its digest
        assert len(self.job.journal("finish")) == 1
        generations, commits = self.generations(), self.job.commits()
        assert generations == sorted(set(generations))
        assert commits == sorted(set(commits))
        assert commits[-1] == self.steps


def _load() -> str:
    return f"(load {os.getloadavg()[0]:.0f})"


def _is_whole(line: str) -> bool:
    return line.endswith("\n")


@pytest.fixture
def network() -> Iterator[Network]:
    yield from namespaces.networks(3)


def test_cut_node_stands_still_by_itself_and_goes_on_in_place_when_the_link_is_healed(
    cluster: Cluster, network: Network
) -> None:
    run = Run(cluster, network)
    holds = Holds(cluster.path / "held")
    run.start([sys.executable, held_launcher.__file__], holds.environment)
    unhurt = run.start_unhurt()
    run.comes_to(5)

    began = time.monotonic()  # for less than the lease: what was sent is sent again
    network.cut(1)
    time.sleep(LEASE_SECONDS / 6)
    network.heal(1)
    lasted = time.monotonic() - began
    run.goes_on()
    assert run.generations() == [1] or lasted > LEASE_SECONDS / 3  # on a machine that has no time for us

    for ways in ((), (Way.SENDS,), (Way.HEARS,)):
        generations = run.generations()
        run.cut(*ways)
        done = [run.job.done(rank) for rank in (0, 1)]
        assert run.generations() == generations  # it waits
        assert done == [run.job.done(rank) for rank in (0, 1)]
        run.heal()
        assert len(run.generations()) == len(generations) + 1

    for place in (PACK, MANIFEST):  # in the middle of a commit
        holds.hold(place)
        run.until(lambda place=place: holds.is_held(place), f"a {place}")
        commits = run.job.commits()
        if place == PACK:  # what becomes of it where it was cut off cannot be heard of
            run.cut()
            holds.let_go(place)
            assert run.job.commits() == commits
        else:  # all ranks' packs are there
            network.cut(1)
            holds.let_go(place)
            run.until(lambda commits=commits: len(run.job.commits()) > len(commits), "the commit")
            run.until(lambda: run.events("interruption")[-1]["generation"] == run.generations()[-1], "the loss")
        run.heal()
    assert [len(pids) for pids in run.pids()] == [1, 1]  # nobody had to be started again

    run.cut()
    generations = run.generations()
    network.heal(1)
    run.until(lambda: run.generations() > generations, "the next generation")
    losses = run.losses()
    network.cut(1)  # once more, in the middle of the recovery
    run.until(lambda: run.losses() > losses, "the loss")
    run.heal()

    run.ends_well()
    assert {event["tier"] for event in run.events("continues")[:-1]} == {"live"}
    assert run.job.history() == unhurt.history()
    assert run.job.end() == unhurt.end()


def test_run_that_may_shrink_goes_on_without_the_cut_node_and_takes_it_in_again(
    cluster: Cluster, network: Network
) -> None:
    run = Run(cluster, network, nnodes="1:2", more=("--rdzv-conf", "last_call_timeout=5"))
    run.start()
    run.comes_to(5, rank=1)

    run.cut()  # healed while the other side recovers, before it has gone on alone
    run.heal()
    assert len(run.generations()) == 2

    run.cut()
    run.until(lambda: run.job.done() > run.job.done(rank=1), "steps of node 0 alone")
    before = run.job.done(rank=1)
    network.heal(1)
    run.until(lambda: run.job.done(rank=1) > before + 1, "steps of both nodes")
    run.ends_well()
    assert [body["world_size"] for body in run.job.journal("generation")] == [2, 2, 1, 2]
    assert sorted({step.number for step in run.job.steps()}) == list(range(run.steps))
    alone = [step for step in run.job.steps() if step.generation == 3]
    assert {step.rank for step in alone} == {0}


def test_training_goes_on_while_the_coordinator_alone_is_cut_off(cluster: Cluster, network: Network) -> None:
    run = Run(cluster, network, coordinator=2)
    coordinator = run.start_coordinator()
    coordinator.says("serving run")
    run.start()
    run.comes_to(5)
    for cuts, ways in enumerate((BOTH, (Way.SENDS,)), 1):
        network.cut(2, ways)
        run.until(lambda cuts=cuts: coordinator.text.count("no node is heard any more") == cuts, "its cut")
        run.goes_on(5)
        network.heal(2)
        run.until(lambda cuts=cuts: coordinator.text.count("carrying on with it") == cuts, "its return")
        commits = run.job.commits()
        run.until(lambda commits=commits: run.job.commits() > commits, "a commit")
    run.ends_well()
    assert coordinator.wait() == 0, coordinator.text
    assert run.generations() == [1]
    assert CUT_OFF not in run.text
    assert [len(pids) for pids in run.pids()] == [1, 1]


def test_networks_leave_nothing_behind() -> None:
    def there() -> list[Path]:
        return [path for path in Path("/run/netns").iterdir() if path.name.startswith(f"ft{os.getpid()}-")]

    def fail() -> None:
        with Network(2) as network:
            assert len(there()) == 3
            network.cut(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert there() == []

"""Two coordinators that continue one journal in an object store, whose replies get lost: one wins, the other stops."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ftrain.agent.coordinator_host import _store, durable_history
from ftrain.core import journal
from ftrain.core.journal import Appended, Appender, Create, Lost, Read, Stalled
from ftrain.core.messages import Attempt
from ftrain.storage.bucket import StoreBucket
from ftrain.storage.object_store import ObjectStorage, Patience
from tests.storage.proxy import LOSE_REPLY, LOSE_REQUEST, PASS, Request, proxy_of
from tests.storage.servers import BUCKET, Server, set_environment

COMMITS = 6
COORDINATORS = 2


def coordinate(storage: ObjectStorage, writer: str, barrier: threading.Barrier) -> tuple[list[str], bool]:
    """Append commits until another coordinator's record is found: what was appended, and whether we were fenced."""
    state = Appender(writer, durable_history(storage).head)
    barrier.wait()
    done: list[str] = []
    for number in range(COMMITS):
        body = journal.CommitBody(Attempt(1, number, 1), 1, writer.encode().hex().ljust(64, "0"), 1)
        events: list[journal.Event] = [journal.Append(body)]
        for now in itertools.count(1000.0, 1000.0):
            state, actions = journal.step(state, events.pop(0), now, 0.0)
            for action in actions:
                match action:
                    case Create() | Read():
                        events.append(_store(storage, action))
                    case Stalled():
                        events.append(journal.Retry())
                    case Appended(record):
                        assert isinstance(record.body, journal.CommitBody)
                        done.append(record.body.manifest_sha256)
                    case Lost():
                        return done, True
            if not events:
                break
    return done, False


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("store", ["moto", "seaweedfs", "azurite", "gcs"])
def test_of_two_coordinators_one_wins_and_the_other_stops(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, store: str, seed: int
) -> None:
    server: Server = request.getfixturevalue(store)
    chances, lock = random.Random(seed), threading.Lock()

    def rule(request: Request) -> str:
        with lock:
            trouble = chances.choice([PASS, PASS, LOSE_REPLY, LOSE_REQUEST, "503"])
        return trouble if request.kind == "PutObject" else PASS

    with proxy_of(server) as proxy:
        set_environment(proxy.server, monkeypatch)
        proxy.rule = rule
        # So little patience that many outcomes stay unknown, and the journal has to find out itself.
        storages = [
            ObjectStorage(StoreBucket(server.scheme, BUCKET, f"two-{store}-{seed}"), patience=Patience(2, 0.001, 0.002))
            for _ in range(COORDINATORS)
        ]
        barrier = threading.Barrier(COORDINATORS)
        with ThreadPoolExecutor(COORDINATORS) as pool:
            found = list(pool.map(coordinate, storages, ("one", "two"), [barrier] * COORDINATORS))
        history = [commit.manifest_sha256 for _, commit in durable_history(storages[0]).commits]
    assert sorted(fenced for _, fenced in found) == [False, True]
    (winner,) = [done for done, fenced in found if not fenced]
    (loser,) = [done for done, fenced in found if fenced]
    assert len(winner) == COMMITS
    assert history[-COMMITS:] == winner
    assert history[:-COMMITS] == loser

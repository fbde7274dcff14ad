"""One good message of each kind, with all that it can have, to make bad ones of."""

from __future__ import annotations

from ftrain.agent import peer_wire
from ftrain.core import messages as m

ATTEMPT = m.Attempt(1, 20, 2)
EARLIER = m.Attempt(1, 10, 1)
PACK = m.PackRecord(0, "packs/00000", "packs/00000.index.json", "0" * 64, 1, 2, 3, (EARLIER,))
HANG = m.Hang("spins while others wait", 31.5, (1, 2), "train.py:7")
ERROR = m.ErrorReport("ValueError", "no", "Traceback", "train.py:3", 1.5)
PEER = m.Peer("node-1", "::1", 4711)
PROGRESS = m.Progress(7, 2, 5, 0.5, 0.25, True, 0.1, 0.2)
RUNNING = m.RunningRank(0, 0, 11, 5, 3, True, 0.1, True, True, 5, (4, 5), "a", True, PROGRESS)
EXIT = m.RankExit(1, 1, 12, 1, 9, 5, 2, ERROR, 1.5, True, (4, 5), "a", True, HANG)
KEPT = m.Kept(2, (4, 5), (ATTEMPT,), "a", True)
REPORT = m.Report(3, 1, False, 2, (RUNNING,), (EXIT,), True, 0, 100, True, True, (ATTEMPT,), (KEPT,))
ORIGIN = m.Origin("/runs/other", EARLIER.path, True, True)
RESUME = m.Resume(EARLIER, 2, 4, "0" * 64, ORIGIN)
LINE = m.Line(20, m.Tier.ARENA, ATTEMPT, ((0, 1),), (1,))
METRICS: dict[str, float | str] = {"loss": 1.5, "norm": "nan"}

FROM_AGENT: list[m.FromAgent] = [
    m.Hello("node-0", 0, 2, "::1", "host", 10, "run", "0" * 64, "0.1", 3, REPORT, True, 4711),
    m.Heartbeat(4, REPORT),
    m.StoreReady(1, "::1", 4712),
    m.Changed(REPORT),
    m.ArmReply(ATTEMPT, False, 21, "too late"),
    m.Sealed(ATTEMPT, (1, 2), m.Cost(0.001, 0.1, 0.01)),
    m.Prepared(ATTEMPT, PACK),
    m.AttemptFailed(ATTEMPT, 1, "the disk is full"),
    m.Notice("SIGTERM", 30.0),
    m.Metrics(1, 20, METRICS),
    m.Goodbye("SIGINT"),
]
FROM_COORDINATOR: list[m.FromCoordinator] = [
    m.Welcome("run", 3, 10.0, 2.0),
    m.Declined("another job runs here", 2),
    m.Prepare(3, 1),
    m.Start(3, 1, 0, 2, 0, 4, "node-0", "::1", 4712, 1, 3, RESUME, LINE, (1,), PEER, m.Fetch(PEER, (0,))),
    m.Stop(3, 1, "rank 1 was killed", 1.0),
    m.Halt(3, 1, "rank 1 was killed"),
    m.KillRank(3, 1, 1, 20, 7, HANG),
    m.Arm(3, ATTEMPT, True, True, (EARLIER,), EARLIER),
    m.Copy(3, ATTEMPT),
    m.Abort(3, ATTEMPT, "the disk is full"),
    m.Committed(3, ATTEMPT),
    m.Verdict(3, ATTEMPT, True),
    m.Release(3, 1),
    m.Leave(3, 0, "done"),
    m.Heard(3, 4),
    m.Tell("text"),
]
FROM_PEER: list[peer_wire.Message] = [
    peer_wire.Greet("run", "node-1"),
    peer_wire.Boundary(1, 0, 5, "a", True, 0),
    peer_wire.Snapshot(1, 0, ATTEMPT, 4096, 100, (EARLIER,)),
    peer_wire.Chunk(0, 0),
    peer_wire.NoRoom("no memory"),
    peer_wire.WantBoundaries(0),
    peer_wire.WantSnapshot(0, ATTEMPT),
    peer_wire.Done(),
    peer_wire.Gone("it has ended"),
]

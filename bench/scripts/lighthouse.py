"""torchft's lighthouse, for as long as it is let live: `lighthouse.py PORT REPLICAS_MIN`.

torchft's own command takes the same settings, but is not where every way to install a package puts it.
"""

from __future__ import annotations

import signal
import sys

from torchft.coordination import LighthouseServer

JOIN_TIMEOUT_MS = 1_000  # its default is a minute, its README's example has 10 s: the others stand still meanwhile
TICK_MS = 50
HEARTBEAT_TIMEOUT_MS = 1_000  # ten heartbeats; its default, 5 s, would be most of a recovery

server = LighthouseServer(
    bind=f"[::]:{int(sys.argv[1])}",
    min_replicas=int(sys.argv[2]),
    join_timeout_ms=JOIN_TIMEOUT_MS,
    quorum_tick_ms=TICK_MS,
    heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS,
)
signal.pause()

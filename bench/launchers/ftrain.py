"""`ftrain launch`: only the killed rank starts again."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launchers.job import CUTS, WITH_A_SPARE, Finished, Job, endpoint

sys.path.append(str(Path(__file__).parents[2]))  # behind all else, for the tests' network

from tests.recovery.namespaces import BOTH, Network, Way, lacking

LINKS = dict(zip(CUTS, (BOTH, (Way.SENDS,), (Way.HEARS,)), strict=True))
FTRAIN = [sys.executable, "-m", "ftrain.cli.main"]


class Ftrain(Job):
    name = "ftrain"
    branch = "ftrain"
    package = "ftrain"
    hurts = ("kill", "stop", *WITH_A_SPARE)
    _network: Network | None = None  # of a host for each node and the spare one, where links are cut
    _cut_off = 0  # which of them

    @classmethod
    def why_left_out(cls, args: argparse.Namespace) -> str | None:
        return super().why_left_out(args) or (args.hurt in CUTS and lacking()) or None

    def prepare(self) -> None:
        super().prepare()
        if self.args.hurt in CUTS:
            self._network = Network(self.args.nodes + 1).__enter__()
        subprocess.run([*FTRAIN, "secret", str(self.path / "secret")], check=True, capture_output=True)

    def commands(self) -> list[list[str]]:
        where = [
            "--rdzv-endpoint",
            f"{self._network.host_name(0)}:29400" if self._network is not None else endpoint(),
            "--run-dir",
            str(self.path / "run"),
            "--secret",
            str(self.path / "secret"),
        ]
        common = [*FTRAIN, "launch", *self.size_flags(), *where, *self.saving_flags()]
        return [[*common, "--node-rank", str(node)] for node in range(self.args.nodes)]

    def placed(self, index: int, command: list[str]) -> list[str]:
        return self._network.inside(index, command) if self._network is not None else command

    def cut(self, index: int) -> None:
        assert self._network is not None
        self._cut_off = index
        self._network.cut(index, LINKS[self.args.hurt])

    def heal(self) -> None:
        assert self._network is not None
        self._network.heal(self._cut_off)

    def stop(self) -> None:
        super().stop()
        if self._network is not None:
            self._network.remove()

    def spare_of(self, command: list[str]) -> list[str]:
        return command[: command.index("--node-rank")]  # it asks for no place of its own

    def saving_flags(self) -> list[str]:
        return ["--checkpoint-every", str(self.args.checkpoint_every), "--snapshot-every", self.args.snapshot_every]

    def finished(self, rank: int) -> list[Finished]:
        """Without rehearsals: ranks that are all new may do their first step twice, the first time for nothing.

        Of two lines of one process for one step only the second counts. The newest line may be such a first one, so it
        waits for the next to show it.
        """
        pairs = itertools.pairwise(self.lines(rank))
        return [line for line, later in pairs if (line.pid, line.step) != (later.pid, later.step)]

    def counted_from(self, killed_at: float) -> float:
        """What a rank does before all are resumed is done alone, for its random numbers."""
        seconds = self._event_seconds("resumed", killed_at)
        return killed_at + seconds if seconds is not None else float("inf")

    def stages(self, killed_at: float) -> dict[str, float]:
        told = {"failure named": "interruption", "all ranks back in their loop": "resumed"}
        times = {what: self._event_seconds(event, killed_at) for what, event in told.items()}
        return {what: seconds for what, seconds in times.items() if seconds is not None}

    def source(self, killed_at: float) -> str:
        """The tier: live, arena or storage."""
        found = self._event("continues", killed_at)
        return str(found["tier"]) if found is not None else ""

    def _event_seconds(self, event: str, killed_at: float) -> float | None:
        found = self._event(event, killed_at)
        return float(found["unix_seconds"]) - killed_at if found is not None else None

    def _event(self, event: str, killed_at: float) -> dict[str, Any] | None:
        """The first of such events in ftrain's own story after the kill."""
        path = self.path / "run" / "events.jsonl"
        told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return next((one for one in told if one["event"] == event and one["unix_seconds"] > killed_at), None)

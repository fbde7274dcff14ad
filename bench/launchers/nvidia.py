"""NVIDIA's resiliency extension, restarts in the job: torchrun's descendant with a monitor beside each rank."""

from __future__ import annotations

import sys

from launchers.job import Job, endpoint

FT_LAUNCHER = [sys.executable, "-m", "nvidia_resiliency_ext.fault_tolerance.launcher"]
SETTINGS = {
    "--monitor-interval": "0.1",  # torchrun's default
    "--workers-stop-timeout": "15",
    "--ft-param-workload_check_interval": "0.5",
    "--ft-param-initial_rank_heartbeat_timeout": "60",
    "--ft-param-rank_heartbeat_timeout": "15",
    "--ft-param-enable-nic-monitor": "False",  # it needs InfiniBand
}


class Nvidia(Job):
    name = "nvidia"
    branch = "nvidia"
    package = "nvidia_resiliency_ext"

    def commands(self) -> list[list[str]]:
        own = ["--rdzv-backend", "c10d", "--rdzv-id", "bench", "--rdzv-endpoint", endpoint(), "--max-restarts", "100"]
        settings = [word for pair in SETTINGS.items() for word in pair]
        return [[*FT_LAUNCHER, *self.size_flags(), *own, *settings] for _ in range(self.args.nodes)]

    def environment(self, index: int) -> dict[str, str]:
        """Its sockets outlive it, so they are to lie where they are removed with the rest."""
        return {**super().environment(index), "TMPDIR": str(self.path)}

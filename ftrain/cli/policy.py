"""What a run's coordinator goes by, made of what the user gave: for the one beside node 0, and the one by itself."""

from __future__ import annotations

from ftrain import __version__
from ftrain.core.membership import FormationPolicy
from ftrain.core.run_state import RunPolicy
from ftrain.core.schedule import CheckpointPolicy
from ftrain.core.supervision import RestartPolicy

HEARTBEAT_SECONDS_MAX = 1.0
HEARTBEATS_PER_LEASE = 10  # so that no single lost one costs a lease


def run_policy(
    run_id: str,
    formation: FormationPolicy,
    restart: RestartPolicy,
    checkpoint: CheckpointPolicy,
    lease_seconds: float,
    stop_grace_seconds: float,
) -> RunPolicy:
    """`lease_seconds` is the user's: what cannot be reached for so long has been given up by then.

    A node that hears nothing any more may be heard for one more heartbeat (TCP goes on with what is new until the first
    repetition is due), so that much of the lease is over when silence begins.
    """
    heartbeat_seconds = min(HEARTBEAT_SECONDS_MAX, lease_seconds / HEARTBEATS_PER_LEASE)
    return RunPolicy(
        run_id=run_id,
        version=__version__,
        formation=formation,
        restart=restart,
        checkpoint=checkpoint,
        lease_seconds=lease_seconds - heartbeat_seconds,
        heartbeat_seconds=heartbeat_seconds,
        stop_grace_seconds=stop_grace_seconds,
    )

"""What a worker and its agent share on one node, beside the control page and the arena.

The agent gives a worker its `Boot` in the environment variable `FTRAIN_BOOT` (JSON). The worker sends the messages
below to its agent over a Unix `SOCK_SEQPACKET` socket, one JSON object a packet; what it sent before it died is still
read. The agent speaks through the control page; only a worker that waits for it is sent a packet, `Recover` or
`Fetched`.
"""

from __future__ import annotations

import msgspec

from ftrain.core.messages import Cost, ErrorReport, Line, Name, Resume, Text

BOOT_VARIABLE = "FTRAIN_BOOT"
PACKET_BYTES_MAX = 192 << 10
STACK_SIGNAL = 61  # a real-time signal: a worker writes the stacks of its Python threads to its standard error
STACK_CHARS_MAX = 8000


class Boot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a worker needs to take part in its generation."""

    run_id: str
    run_dir: str  # on this node
    storage: str  # the root, as `open_storage` takes it: journal/, checkpoints/
    generation: int
    rank: int
    local_rank: int
    world_size: int
    page_fd: int
    arena_fd: int
    channel_fd: int
    box_fd: int  # the black box
    arena_bytes_max: int  # this rank's bound; 0 for none but the host's memory
    checkpoints: bool  # False: the run takes none
    resume: Resume | None  # the commit to start from, None for the beginning
    loopback: bool = False  # all nodes of the run are on this host: groups bind to loopback only
    line: Line | None = None  # other ranks are alive, and this is what all go on from
    slots: int = 2  # as `messages.Start` has it
    fetched: bool = False  # what it goes on from comes from another node meanwhile: `Fetched` says that it is there


class Recover(msgspec.Struct, frozen=True, tag="recover", tag_field="kind", forbid_unknown_fields=True):
    """For a halted worker: the generation in which it goes on, where its peers meet, and what from."""

    generation: int
    master_address: str
    master_port: int
    line: Line
    resume: Resume | None


class Fetched(msgspec.Struct, frozen=True, tag="fetched", tag_field="kind", forbid_unknown_fields=True):
    """For a worker whose `Boot` told of it: what it goes on from is in its box and its arena."""


ToWorker = Recover | Fetched


class WorkerJoined(msgspec.Struct, frozen=True, tag="joined", tag_field="kind", forbid_unknown_fields=True):
    """The script called `ftrain.join()`: it wants the rollback, not only the launcher."""


class WorkerLooping(msgspec.Struct, frozen=True, tag="looping", tag_field="kind", forbid_unknown_fields=True):
    """The worker restored its state and is about to do step number `step` (steps finished so far)."""

    step: int
    total_steps: int  # 0 for endless
    restore_seconds: float = 0.0
    generation: int = 0  # the one that it is in its loop in


class WorkerPlanned(msgspec.Struct, frozen=True, tag="planned", tag_field="kind", forbid_unknown_fields=True):
    """What the worker holds of the shared state, as `messages.RunningRank` has it. Said again once it has `slots`."""

    shard: Name
    replays: bool
    slots: int


class WorkerHalted(msgspec.Struct, frozen=True, tag="halted", tag_field="kind", forbid_unknown_fields=True):
    """The worker stands still, for its generation is over or its peers are gone."""

    generation: int
    live: int  # the step whose shared state is in its tensors, -1 for none
    kept: tuple[int, ...]


class WorkerSealed(msgspec.Struct, frozen=True, tag="sealed", tag_field="kind", forbid_unknown_fields=True):
    number: int  # of the attempt
    cost: Cost


class WorkerSealFailed(msgspec.Struct, frozen=True, tag="seal_failed", tag_field="kind", forbid_unknown_fields=True):
    number: int
    cause: Text


class WorkerAtEnd(msgspec.Struct, frozen=True, tag="at_end", tag_field="kind", forbid_unknown_fields=True):
    """All steps are done; the worker waits until ARMED == step (and snapshots) or RELEASE."""

    step: int


class WorkerMetrics(msgspec.Struct, frozen=True, tag="metrics", tag_field="kind", forbid_unknown_fields=True):
    step: int
    values: dict[Name, float | Name]  # a number that JSON lacks is its name: nan, inf, -inf


class WorkerError(msgspec.Struct, frozen=True, tag="error", tag_field="kind", forbid_unknown_fields=True):
    error: ErrorReport


FromWorker = (
    WorkerJoined
    | WorkerLooping
    | WorkerPlanned
    | WorkerHalted
    | WorkerSealed
    | WorkerSealFailed
    | WorkerAtEnd
    | WorkerMetrics
    | WorkerError
)

"""The words of the control plane: what agents and the coordinator say to each other.

They are the events that `core.coordinator` and `core.node` take and the actions that they emit, so the simulator
speaks them as well as the WebSocket does. On the wire each is one JSON object, told apart by its `kind`. A string, a
list and a message have a bound (`Text`, `MESSAGE_BYTES_MAX`): a stranger must not be able to fill our memory.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec

MESSAGE_BYTES_MAX = 4 << 20
TRACEBACK_CHARS_MAX = 64 << 10
PROBLEM_CHARS_MAX = 300  # of what a parser says: it repeats what a stranger wrote
RANKS_PER_NODE_MAX = 1024

Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=TRACEBACK_CHARS_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Boundaries = Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]


class Attempt(msgspec.Struct, frozen=True, order=True, forbid_unknown_fields=True):
    """One try to checkpoint one step. `number` never repeats within a generation."""

    generation: Count
    step: Count
    number: Count

    @property
    def path(self) -> str:
        """Where this attempt's files live, relative to the run directory."""
        return f"checkpoints/step-{self.step:012d}/g{self.generation:04d}-a{self.number}"

    def __str__(self) -> str:
        return f"step {self.step} (generation {self.generation}, attempt {self.number})"


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a snapshot took of a rank."""

    stall_seconds: float = 0.0  # what it held the training thread for
    staging_seconds: float = 0.0  # from the boundary until it was sealed
    taken_seconds: float = 0.0  # of processors, by copying, while others wanted them

    def most(self, other: Cost) -> Cost:
        return Cost(
            max(self.stall_seconds, other.stall_seconds),
            max(self.staging_seconds, other.staging_seconds),
            max(self.taken_seconds, other.taken_seconds),
        )


class ErrorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An exception that ended a worker, as the worker itself wrote it down."""

    type: Name
    message: Text
    traceback: Text
    where: Name = ""  # file:line of the innermost frame of the user's own code
    unix_seconds: float = 0.0


class Hang(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a rank that is alive is ended: `text` goes on from "rank 1 hung: "."""

    text: Text
    seconds: float = 0.0  # that it stood still
    waiting: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)] = ()  # some of the ranks that waited for it
    stack: Text = ""  # where it was in Python, if it could say


class RankExit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one worker ended. `signal` is 0 unless a signal ended it."""

    rank: Count
    local_rank: Count
    pid: Count
    code: int
    signal: Count = 0
    step: int = -1  # steps it had finished, from its control page
    phase: Count = 0
    error: ErrorReport | None = None
    unix_seconds: float = 0.0
    ordered: bool = False  # it was told to end: how it ended says nothing
    kept: Boundaries = ()  # the boundaries whose private state outlived it
    shard: Name = ""
    replays: bool = False
    hang: Hang | None = None  # its agent ended it for this

    @property
    def failed(self) -> bool:
        return not self.ok and not self.ordered

    @property
    def ok(self) -> bool:
        return self.code == 0 and self.signal == 0


class PackRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A durable pack: what the coordinator must know of it to commit. `index_sha256` covers its own list of boxes."""

    rank: Count
    path: Name  # the pack's zarr array, relative to the attempt
    index_path: Name  # the pack's list of boxes, relative to the attempt
    index_sha256: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    payload_bytes: Count  # of all tensors, those that it refers to included
    file_bytes: Count
    tensors: Count
    refers: Annotated[tuple[Attempt, ...], msgspec.Meta(max_length=64)] = ()  # to packs that these have of this rank


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a rank is between its boundaries, and for how long it has stood still there."""

    collective: Count = 0  # collectives that it has entered since it came into its loop
    kind: Count = 0  # of the last one
    mark: Count = 0  # `collective` at its newest boundary
    still_seconds: float = 0.0
    idle_seconds: float = 0.0  # of these, with neither processor nor I/O, its children's included
    stopped: bool = False  # by a signal
    median_seconds: float = 0.0  # of its latest steps, 0 where there is none yet
    slowest_seconds: float = 0.0


class RunningRank(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rank: Count
    local_rank: Count
    pid: Count
    step: int
    phase: Count
    joined: bool = False  # it called ftrain.join()
    stall_seconds: float = 0.0  # what the newest snapshot held its training thread for
    looped: bool = False  # it has been in its loop, in this generation or an earlier one: it can continue in place
    halted: bool = False  # it stands still, and waits for the generation that it is to continue in
    live: int = -1  # halted: the step whose shared state it has in its tensors, -1 where they are of no step
    kept: Boundaries = ()  # halted: the boundaries whose private state is in its black box
    shard: Name = ""  # equal for ranks that are replicas of each other; "" until it has planned a snapshot
    replays: bool = False  # doing a step again by itself gives its private state of the step's end
    progress: Progress | None = None  # None until its agent has looked
    slots: Count = 0  # of its arena; 0 until it has memory for snapshots


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node keeps in its memory of one rank of another node."""

    rank: Count
    boundaries: Boundaries = ()  # whose private state is there
    attempts: Annotated[tuple[Attempt, ...], msgspec.Meta(max_length=4)] = ()  # whose snapshots are there, whole
    shard: Name = ""
    replays: bool = False


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node, and where its agent takes and gives peer copies."""

    node: Name
    address: Name
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Fetch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What these ranks go on from is at another node: they wait for it when they are ready to go on."""

    peer: Peer
    ranks: Annotated[tuple[Count, ...], msgspec.Meta(max_length=RANKS_PER_NODE_MAX)]


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node runs at this moment. Complete: whoever has the newest report needs none of the older ones."""

    version: Count = 0  # counts up: an older report that comes late is passed over
    generation: Count = 0  # the generation whose workers it runs or ran last, 0 for none
    stopped: bool = True  # nothing of that generation runs here any more, nor will
    attempt_seen: Count = 0  # highest attempt number seen in that generation
    ranks: tuple[RunningRank, ...] = ()  # alive
    exits: tuple[RankExit, ...] = ()
    looping: bool = False  # every local worker is in its loop: attempts make sense
    first_step: int = -1  # where the loop began
    total_steps: Count = 0  # 0 for endless or unknown
    at_end: bool = False  # every local worker finished its last step, and waits or waited for its snapshot
    halted: bool = False  # what is alive of that generation stands still, and goes on in a later one or not at all
    held: Annotated[tuple[Attempt, ...], msgspec.Meta(max_length=16)] = ()  # sealed here for all local ranks
    keeps: Annotated[tuple[Kept, ...], msgspec.Meta(max_length=RANKS_PER_NODE_MAX)] = ()  # for another node
    sending_seconds: float = 0.0  # of a processor, while others wanted it: what sending the newest copy took


# ---------------------------------------------------------------------------------------------- agent -> coordinator


class Hello(msgspec.Struct, frozen=True, tag="hello", tag_field="kind", forbid_unknown_fields=True):
    """An agent introduces itself, and says what it still runs: so a new coordinator learns the state of the world."""

    node: Name  # unique for each life of an agent
    node_rank: int  # as asked for by the user, -1 for any
    processes: Annotated[int, msgspec.Meta(ge=1, le=RANKS_PER_NODE_MAX)]
    address: Name  # where this node's workers can be reached
    host: Name
    pid: Count
    run_id: Name
    job_sha256: Name  # digest of script, arguments and topology: all nodes must run the same job
    version: Name
    term_seen: Count  # highest coordinator term that this agent has obeyed
    report: Report = Report()
    joins: bool = False  # its script calls ftrain.join(): until it comes to that, it has done nothing
    peer_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0  # where it takes peer copies, 0 where it takes none


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", tag_field="kind", forbid_unknown_fields=True):
    """Renews the lease, and says again all that matters, so that no lost message can stall the run for long."""

    sequence: Count
    report: Report = Report()


class StoreReady(msgspec.Struct, frozen=True, tag="store_ready", tag_field="kind", forbid_unknown_fields=True):
    generation: Count
    address: Name
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Changed(msgspec.Struct, frozen=True, tag="changed", tag_field="kind", forbid_unknown_fields=True):
    """Something in the report changed that the coordinator should not learn at the next heartbeat only."""

    report: Report


class ArmReply(msgspec.Struct, frozen=True, tag="arm_reply", tag_field="kind", forbid_unknown_fields=True):
    attempt: Attempt
    accepted: bool
    step: int = -1  # the furthest step finished here, when refused
    reason: Name = ""


class Sealed(msgspec.Struct, frozen=True, tag="sealed", tag_field="kind", forbid_unknown_fields=True):
    """The attempt's snapshot of all of the node's ranks, these, is in its memory."""

    attempt: Attempt
    ranks: Annotated[tuple[Count, ...], msgspec.Meta(max_length=RANKS_PER_NODE_MAX)]
    cost: Cost = Cost()  # of each kind what it was on the rank where that was most


class Prepared(msgspec.Struct, frozen=True, tag="prepared", tag_field="kind", forbid_unknown_fields=True):
    attempt: Attempt
    pack: PackRecord


class AttemptFailed(msgspec.Struct, frozen=True, tag="attempt_failed", tag_field="kind", forbid_unknown_fields=True):
    attempt: Attempt
    rank: Count
    cause: Text


class Notice(msgspec.Struct, frozen=True, tag="notice", tag_field="kind", forbid_unknown_fields=True):
    """This node is to leave: `why` is "SIGTERM" (the run goes on elsewhere) or "SIGINT" (the user ends it)."""

    why: Name
    grace_seconds: float


class Metrics(msgspec.Struct, frozen=True, tag="metrics", tag_field="kind", forbid_unknown_fields=True):
    generation: Count
    step: Count
    values: dict[Name, float | Name]  # a number that JSON lacks is its name: nan, inf, -inf


class Logged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A metric's value, and the number of the step that logged it."""

    step: Count
    value: float | Name  # as in `Metrics`


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye", tag_field="kind", forbid_unknown_fields=True):
    """The agent leaves on purpose: no lease needs to run out."""

    why: Name


FromAgent = (
    Hello | Heartbeat | StoreReady | Changed | ArmReply | Sealed | Prepared | AttemptFailed | Notice | Metrics | Goodbye
)

# ---------------------------------------------------------------------------------------------- coordinator -> agent


class Welcome(msgspec.Struct, frozen=True, tag="welcome", tag_field="kind", forbid_unknown_fields=True):
    run_id: Name
    term: Count  # journal sequence number with which this coordinator took over: higher fences lower
    lease_seconds: float
    heartbeat_seconds: float


class Declined(msgspec.Struct, frozen=True, tag="declined", tag_field="kind", forbid_unknown_fields=True):
    """This agent cannot take part: `reason` is a sentence for the user, `exit_code` what its launcher ends with."""

    reason: Text
    exit_code: int


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the files of a commit are that a forked run began with: in another run, which wrote them."""

    url: Text  # of that run's storage
    path: Text  # of the checkpoint, below it
    weights_only: bool = False  # only the modules are taken over
    own_options: bool = False  # all but the options of optimizers are


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The recovery line that a generation starts from: a committed attempt, and its journal entry."""

    attempt: Attempt
    world_size: Count
    journal_sequence: Count
    manifest_sha256: Name  # as the journal has it: a restore proves that it reads what was committed
    origin: Origin | None = None  # None: the files are this run's own


class Tier(Enum):
    """Where the state of a recovery line is."""

    LIVE = "live"  # in the tensors of ranks that are alive
    ARENA = "arena"  # in a snapshot that every rank's node still has
    STORAGE = "storage"  # in a commit


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state that ranks which are alive and ranks which are forked anew go on from together."""

    step: Count
    tier: Tier
    attempt: Attempt | None = None  # ARENA: the snapshot
    copies: tuple[tuple[Count, Count], ...] = ()  # LIVE: (from, to): who gives its shared state to whom
    replay: tuple[Count, ...] = ()  # LIVE: ranks that do the step before the line again, for their private state


class Start(msgspec.Struct, frozen=True, tag="start", tag_field="kind", forbid_unknown_fields=True):
    """Fork this generation's workers: `processes` of them, from rank `first_rank`, but for the `survivors`.

    Those are alive, stand still, and go on in place; with them, everybody goes on from `line`.
    """

    term: Count
    generation: Count
    group_rank: Count
    group_size: Count
    first_rank: Count
    world_size: Count
    first_node: Name  # the node of rank 0, which hosts the store
    master_address: Name
    master_port: Count
    restarts: Count
    max_restarts: Count
    resume: Resume | None
    line: Line | None = None  # None: all ranks are new, and go on from `resume`
    survivors: tuple[Count, ...] = ()  # of this node
    keeper: Peer | None = None  # the node that is to have copies of what this one's ranks go on from
    fetch: Fetch | None = None
    slots: Count = 2  # how many snapshots there is to be memory for, where some of it no other rank has


class Prepare(msgspec.Struct, frozen=True, tag="prepare", tag_field="kind", forbid_unknown_fields=True):
    """Host the store of the coming generation and answer with `StoreReady`: sent to the node of rank 0 only."""

    term: Count
    generation: Count


class Stop(msgspec.Struct, frozen=True, tag="stop", tag_field="kind", forbid_unknown_fields=True):
    """Stop what runs of this generation and report it `stopped`. `grace_seconds` is for scripts that never joined."""

    term: Count
    generation: Count
    why: Text
    grace_seconds: float


class Halt(msgspec.Struct, frozen=True, tag="halt", tag_field="kind", forbid_unknown_fields=True):
    """The generation is over. Workers that have been in their loop are to stand still, others are stopped."""

    term: Count
    generation: Count
    why: Text


class KillRank(msgspec.Struct, frozen=True, tag="kill_rank", tag_field="kind", forbid_unknown_fields=True):
    """This rank hangs and is to be ended, if it still is where it was seen."""

    term: Count
    generation: Count
    rank: Count
    step: int
    collective: Count
    hang: Hang


class Arm(msgspec.Struct, frozen=True, tag="arm", tag_field="kind", forbid_unknown_fields=True):
    """Snapshot at the boundary where `attempt.step` steps are done. With `hold`, wait there for a `Verdict`."""

    term: Count
    attempt: Attempt
    hold: bool = False
    persist: bool = True  # False: it stays in the arenas
    stays: Annotated[tuple[Attempt, ...], msgspec.Meta(max_length=4)] = ()  # snapshots whose slots stay as they are
    base: Attempt | None = None  # the commit whose packs may be referred to, for what has not changed since


class Copy(msgspec.Struct, frozen=True, tag="copy", tag_field="kind", forbid_unknown_fields=True):
    """This snapshot, which the node holds, to its keeper from now on."""

    term: Count
    attempt: Attempt


class Abort(msgspec.Struct, frozen=True, tag="abort", tag_field="kind", forbid_unknown_fields=True):
    term: Count
    attempt: Attempt
    cause: Text


class Committed(msgspec.Struct, frozen=True, tag="committed", tag_field="kind", forbid_unknown_fields=True):
    term: Count
    attempt: Attempt


class Verdict(msgspec.Struct, frozen=True, tag="verdict", tag_field="kind", forbid_unknown_fields=True):
    """For workers that hold at the attempt's boundary: all of them leave, or all of them go on."""

    term: Count
    attempt: Attempt
    leave: bool


class Release(msgspec.Struct, frozen=True, tag="release", tag_field="kind", forbid_unknown_fields=True):
    """Workers that wait for a last snapshot need not wait any longer."""

    term: Count
    generation: Count


class Leave(msgspec.Struct, frozen=True, tag="leave", tag_field="kind", forbid_unknown_fields=True):
    """The run is over for this agent. It stops what is left and its launcher ends with `exit_code`."""

    term: Count
    exit_code: int
    summary: Text


class Heard(msgspec.Struct, frozen=True, tag="heard", tag_field="kind", forbid_unknown_fields=True):
    """Answers a heartbeat: the agent's lease was renewed not before that was sent."""

    term: Count
    sequence: Count


class Tell(msgspec.Struct, frozen=True, tag="tell", tag_field="kind", forbid_unknown_fields=True):
    """One line for the people who watch this node's terminal."""

    text: Text


FromCoordinator = (
    Welcome
    | Declined
    | Prepare
    | Start
    | Stop
    | Halt
    | KillRank
    | Arm
    | Copy
    | Abort
    | Committed
    | Verdict
    | Release
    | Leave
    | Heard
    | Tell
)

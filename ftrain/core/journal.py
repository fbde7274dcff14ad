"""The run's one history: what a journal record is, and the rule by which a stale coordinator loses.

Records are files `journal/<20-digit sequence>.json`, each created exclusively and each naming its predecessor's
digest. Whoever creates number n+1 after having read number n continues the history; everybody else finds the name
taken, reads who won, and stops for good. A reply that was lost means *unknown*: the record is read back, and ours is
told from another's by its nonce. docs/protocol.md has the argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, NamedTuple

import msgspec

from ftrain.core.messages import PROBLEM_CHARS_MAX, Attempt, Logged, Name, Origin
from ftrain.errors import CorruptCheckpoint

DIRECTORY = "journal"
RECORD_BYTES_MAX = 8 << 20
REFERS_MAX = 1 << 16
METRICS_MAX = 256  # in one record
RETRY_SECONDS = (0.2, 1.0, 5.0)


class MemberRecord(msgspec.Struct, frozen=True):
    """One node's place in a generation."""

    node: str
    node_rank: int
    first_rank: int
    processes: int
    host: str = ""


class RunBody(msgspec.Struct, frozen=True, tag="run", tag_field="kind"):
    """A coordinator takes the run over. Its sequence number is that coordinator's term."""

    run_id: str
    job_sha256: str
    version: str


class GenerationBody(msgspec.Struct, frozen=True, tag="generation", tag_field="kind"):
    generation: int
    world_size: int
    members: tuple[MemberRecord, ...]
    resumes: Attempt | None  # the newest commit at that time
    why: str = ""
    line_step: int = -1  # what ranks that were alive went on from, -1 where all ranks were new


class CommitBody(msgspec.Struct, frozen=True, tag="commit", tag_field="kind", omit_defaults=True):
    attempt: Attempt
    world_size: int
    manifest_sha256: str
    payload_bytes: int
    origin: Origin | None = None  # of a forked run's first commit: `attempt` then counts here, its files are there
    refers: Annotated[tuple[Attempt, ...], msgspec.Meta(max_length=REFERS_MAX)] = ()  # whose packs it needs, too
    metrics: Annotated[dict[Name, Logged], msgspec.Meta(max_length=METRICS_MAX)] = {}


class RetireBody(msgspec.Struct, frozen=True, tag="retire", tag_field="kind"):
    """The commit named here may be deleted from now on, and no longer be resumed from."""

    attempt: Attempt


class FinishBody(msgspec.Struct, frozen=True, tag="finish", tag_field="kind"):
    exit_code: int
    step: int
    summary: str


Body = RunBody | GenerationBody | CommitBody | RetireBody | FinishBody


class Record(msgspec.Struct, frozen=True):
    sequence: int
    previous: str  # sha256 of the predecessor's whole file, "" for the first
    nonce: str  # tells our own record from another's when the reply was lost
    unix_seconds: float
    body: Body


class _Envelope(msgspec.Struct, frozen=True):
    sha256: str
    record: msgspec.Raw


_RECORD = msgspec.json.Decoder(Record)
_ENVELOPE = msgspec.json.Decoder(_Envelope)


def path_of(sequence: int) -> str:
    return f"{DIRECTORY}/{sequence:020d}.json"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encode(record: Record) -> bytes:
    """The record's file: every byte of it is covered by the checksum it carries or by the successor's `previous`."""
    raw = msgspec.json.encode(record)
    return msgspec.json.encode(_Envelope(digest(raw), msgspec.Raw(raw))) + b"\n"


def decode(data: bytes, path: str) -> Record:
    """Read one record back. Raises `CorruptCheckpoint` naming `path`."""
    if len(data) > RECORD_BYTES_MAX:
        raise CorruptCheckpoint(f"{path}: a record of {len(data)} bytes is over the limit of {RECORD_BYTES_MAX}")
    try:
        envelope = _ENVELOPE.decode(data)
        if digest(bytes(envelope.record)) != envelope.sha256 or encode_raw(envelope) != data:
            raise CorruptCheckpoint(f"{path}: the record does not match its checksum; the file was changed or torn")
        return _RECORD.decode(envelope.record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: not a journal record: {str(error)[:PROBLEM_CHARS_MAX]}") from None


def encode_raw(envelope: _Envelope) -> bytes:
    return msgspec.json.encode(envelope) + b"\n"


@dataclass(frozen=True, slots=True)
class Head:
    """The newest record that this coordinator knows to be in the journal."""

    sequence: int = 0
    digest: str = ""


class Committed(NamedTuple):
    """A commit, and its place in the journal."""

    sequence: int  # in the journal
    unix_seconds: float  # when it was committed
    commit: CommitBody


@dataclass(frozen=True, slots=True)
class History:
    """What the journal says, read from its beginning."""

    head: Head = Head()
    run: RunBody | None = None
    generation: GenerationBody | None = None
    commits: tuple[tuple[int, CommitBody], ...] = ()  # (journal sequence, commit), oldest first, retired ones left out
    times: Mapping[int, float] = field(default_factory=dict)  # of each of these, when it was committed, by sequence
    retired: tuple[Committed, ...] = ()  # a pin may keep their files
    lingering: frozenset[Attempt] = frozenset()  # retired ones to whose packs a commit refers that is not retired
    let_go: tuple[Attempt, ...] = ()  # by the newest record: nothing needs their files any more
    finish: FinishBody | None = None

    @property
    def needed(self) -> frozenset[Attempt]:
        """The attempts whose files are a commit's that is not retired, or are referred to by one."""
        return self.lingering.union(body.attempt for _, body in self.commits)

    def after(self, record: Record, record_digest: str) -> History:
        """The history with one more record. Raises `CorruptCheckpoint` when the chain does not hold."""
        if record.sequence != self.head.sequence + 1 or record.previous != self.head.digest:
            raise CorruptCheckpoint(
                f"{path_of(record.sequence)}: does not continue the record before it; the journal was changed by hand"
            )
        base = replace(self, head=Head(record.sequence, record_digest), let_go=())
        match record.body:
            case RunBody() as run:
                return replace(base, run=run, finish=None)
            case GenerationBody() as generation:
                return replace(base, generation=generation)
            case CommitBody() as commit:
                times = {**self.times, record.sequence: record.unix_seconds}
                return replace(base, commits=(*self.commits, (record.sequence, commit)), times=times)
            case RetireBody(attempt=attempt):
                kept = tuple(item for item in self.commits if item[1].attempt != attempt)
                gone = [item for item in self.commits if item[1].attempt == attempt]
                times = {sequence: self.times[sequence] for sequence, _ in kept}
                retired = (*self.retired, *(Committed(sequence, self.times[sequence], body) for sequence, body in gone))
                referred = {one for _, body in kept for one in body.refers}
                lingering = (self.lingering | {attempt}) & referred
                let_go = tuple(sorted((self.lingering | {attempt}) - referred))
                return replace(base, commits=kept, times=times, retired=retired, lingering=lingering, let_go=let_go)
            case FinishBody() as finish:
                return replace(base, finish=finish)


# --------------------------------------------------------------------------------------------------------- appending


class Outcome(Enum):
    """How storage answered an exclusive create."""

    CREATED = "created"
    EXISTS = "exists"
    UNKNOWN = "unknown"  # the reply was lost: it may or may not be there, now or later
    FAILED = "failed"  # certainly not there: a full disk, a refused write


class Stage(Enum):
    IDLE = "idle"
    CREATING = "creating"
    READING = "reading"
    PROBING = "probing"  # nothing to write: looking whether somebody else has continued the history
    WAITING = "waiting"  # storage failed; tried again at `retry_at`
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Create:
    """Create `path` exclusively and durably, and answer with `Created`."""

    path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """Read `path`, and answer with `ReadBack`."""

    path: str


@dataclass(frozen=True, slots=True)
class Append:
    body: Body


@dataclass(frozen=True, slots=True)
class Created:
    path: str
    outcome: Outcome
    cause: str = ""


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What is at `path`: its bytes, None when certainly absent; `known` is False when storage did not answer."""

    path: str
    data: bytes | None
    known: bool = True


@dataclass(frozen=True, slots=True)
class Retry:
    """Time has passed: try again what storage refused."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Look whether the history has been continued by somebody else, if there is nothing to write that would show it."""


@dataclass(frozen=True, slots=True)
class Appended:
    """The record is in the history, durably."""

    record: Record
    digest: str  # of its file


@dataclass(frozen=True, slots=True)
class Lost:
    """Another coordinator holds this sequence number. Nothing more may be decided here."""

    path: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """Storage did not take the record; it is tried again at `retry_at`."""

    path: str
    cause: str
    retry_at: float


Event = Append | Created | ReadBack | Retry | Probe
Action = Create | Read | Appended | Lost | Stalled


@dataclass(frozen=True, slots=True)
class Appender:
    """Writes one record at a time, in order. `writer` is unique for each life of a coordinator."""

    writer: str
    head: Head
    stage: Stage = Stage.IDLE
    pending: tuple[Body, ...] = ()
    record: Record | None = None  # being written
    data: bytes = b""
    tries: int = 0
    retry_at: float = 0.0


def step(state: Appender, event: Event, now: float, wall: float) -> tuple[Appender, tuple[Action, ...]]:
    """Append, or learn that somebody else did. `wall` is the Unix time that new records carry."""
    if state.stage is Stage.FENCED:
        return state, ()
    match event:
        case Append(body):
            return _next(replace(state, pending=(*state.pending, body)), wall)
        case Created(path, outcome, cause):
            if state.stage is not Stage.CREATING or path != _path(state):
                return state, ()
            return _created(state, outcome, cause, now, wall)
        case ReadBack(path, data, _) if state.stage is Stage.PROBING:
            if path != _path(state):
                return state, ()
            if data is not None:
                return replace(state, stage=Stage.FENCED, pending=()), (Lost(path),)
            return _next(replace(state, stage=Stage.IDLE), wall)
        case ReadBack(path, data, known):
            if state.stage is not Stage.READING or path != _path(state):
                return state, ()
            return _read_back(state, data, known, now, wall)
        case Retry():
            if state.stage is not Stage.WAITING or now < state.retry_at:
                return state, ()
            # Read before writing again: the try that failed may have landed after all.
            return replace(state, stage=Stage.READING), (Read(_path(state)),)
        case Probe():
            if state.stage is not Stage.IDLE:
                return state, ()
            return replace(state, stage=Stage.PROBING), (Read(_path(state)),)


def _path(state: Appender) -> str:
    return path_of(state.head.sequence + 1)


def _next(state: Appender, wall: float) -> tuple[Appender, tuple[Action, ...]]:
    if state.stage is not Stage.IDLE or not state.pending:
        return state, ()
    sequence = state.head.sequence + 1
    record = Record(sequence, state.head.digest, f"{state.writer}:{sequence}", wall, state.pending[0])
    data = encode(record)
    state = replace(state, stage=Stage.CREATING, record=record, data=data, tries=0)
    return state, (Create(path_of(sequence), data),)


def _created(
    state: Appender, outcome: Outcome, cause: str, now: float, wall: float
) -> tuple[Appender, tuple[Action, ...]]:
    match outcome:
        case Outcome.CREATED:
            return _done(state, wall)
        case Outcome.UNKNOWN if state.tries:
            return _wait(state, cause, now)  # not again at once: storage is in trouble
        case Outcome.EXISTS | Outcome.UNKNOWN:
            # EXISTS may be our own earlier try whose reply was lost.
            tries = state.tries + (outcome is Outcome.UNKNOWN)
            return replace(state, stage=Stage.READING, tries=tries), (Read(_path(state)),)
        case Outcome.FAILED:
            return _wait(state, cause, now)


def _read_back(
    state: Appender, data: bytes | None, known: bool, now: float, wall: float
) -> tuple[Appender, tuple[Action, ...]]:
    if not known:
        return _wait(state, "the journal cannot be read back", now)
    if data is None:
        return replace(state, stage=Stage.CREATING), (Create(_path(state), state.data),)
    if data == state.data:
        return _done(state, wall)
    return replace(state, stage=Stage.FENCED, pending=()), (Lost(_path(state)),)


def _wait(state: Appender, cause: str, now: float) -> tuple[Appender, tuple[Action, ...]]:
    retry_at = now + RETRY_SECONDS[min(state.tries, len(RETRY_SECONDS) - 1)]
    state = replace(state, stage=Stage.WAITING, tries=state.tries + 1, retry_at=retry_at)
    return state, (Stalled(_path(state), cause, retry_at),)


def _done(state: Appender, wall: float) -> tuple[Appender, tuple[Action, ...]]:
    assert state.record is not None
    head = Head(state.record.sequence, digest(state.data))
    done = Appended(state.record, head.digest)
    state = replace(state, stage=Stage.IDLE, head=head, pending=state.pending[1:], record=None, data=b"")
    state, actions = _next(state, wall)
    return state, (done, *actions)

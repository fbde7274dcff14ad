"""Every error that ftrain raises, grouped by what a handler should do with it.

Each class carries the exit code that `ftrain` ends with when the error reaches the command line. A message says what
happened, where (rank, generation, step, path), and what to do next.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the `ftrain` commands end with. docs/operation.md has the table for people."""

    OK = 0
    FAILED = 1  # the script failed, or the restart budget is spent
    USAGE = 2  # a wrong flag, a missing script, a directory that cannot be used
    UNAVAILABLE = 69  # too few nodes in time, no coordinator, a refused connection
    INTERNAL = 70  # ftrain itself is wrong
    STORAGE = 74  # the run directory cannot be read or written
    PREEMPTED = 75  # ended by SIGTERM, the last finished step is committed: start it again to go on
    PREEMPTED_UNSAVED = 76  # ended by SIGTERM, and the last finished step could not be committed in time
    REFUSED = 77  # the run's secret was not accepted
    INTERRUPTED = 130  # Ctrl-C


class FtrainError(Exception):
    """The root of the tree. Catch it to catch everything that ftrain raises on purpose."""

    exit_code: ExitCode = ExitCode.INTERNAL


class UsageError(FtrainError):
    """The caller asked for something that cannot be: correct the call."""

    exit_code = ExitCode.USAGE


class NotPlainData(UsageError):
    """A tracked value is neither a tensor nor plain data. The message names its key."""


class UnsupportedTensor(UsageError):
    """A tensor whose dtype or placement the checkpoint format cannot hold. The message names its key."""


class MismatchedState(UsageError):
    """The checkpoint is of another model or optimizer than the one given. The message names the keys."""


class StorageError(FtrainError):
    """Storage refused, failed or lied. The last commit stands; trying again later may help."""

    exit_code = ExitCode.STORAGE


class AlreadyExists(StorageError):
    """An exclusive create found the name taken."""


class NotFound(StorageError):
    """The named object is not there."""


class UnknownOutcome(StorageError):
    """The reply was lost: the operation may or may not have happened. Read back before deciding."""


class ForeignAnswer(UnknownOutcome):
    """What answered is no store of the kind that was asked for, or not enough of one to say what it did."""


class CorruptCheckpoint(StorageError):
    """Bytes that do not match their checksum, or a record that does not parse. Names tensor, rank, file and offset."""


class CheckpointNotFound(StorageError):
    """There is no such commit in this run. The message names the newest one there is."""

    exit_code = ExitCode.USAGE


class Fenced(FtrainError):
    """Another coordinator has continued this run's journal: this one must stop and change nothing."""

    exit_code = ExitCode.FAILED


class ProtocolError(FtrainError):
    """The other side sent what the protocol does not allow. The connection is closed, the run goes on."""


class Refused(FtrainError):
    """The other side does not hold the run's secret, or we do not hold its."""

    exit_code = ExitCode.REFUSED


class Unavailable(FtrainError):
    """What is needed is not there (yet): nodes, a coordinator, a port."""

    exit_code = ExitCode.UNAVAILABLE


class PeerLost(FtrainError):
    """The generation was revoked, so a collective cannot begin or a group cannot be made. The step is done again."""

    exit_code = ExitCode.FAILED


class Unrecoverable(FtrainError):
    """This process cannot be brought round after a failure. Start it anew; the others go on."""

    exit_code = ExitCode.FAILED


class OutOfMemory(FtrainError):
    """The host has not the memory that the arena needs. The message has both figures."""

    exit_code = ExitCode.USAGE


class Preempted(SystemExit):
    """Raised in the training thread after the last step was captured because the run is leaving this machine.

    A SystemExit, so that `finally` blocks run and nobody's `except Exception` swallows it.
    """

    def __init__(self) -> None:
        super().__init__(int(ExitCode.PREEMPTED))

"""Storage that forgets what was not synced, and answers late, wrongly, or not at all.

A file is durable when its content was synced and so were its directory and its directory's own entry. A power cut
keeps what is durable and any subset of the rest. The operations are the shells' storage code, step by step: a pack is
written, synced, then its directory, then that directory's parent; a journal record is linked (its content is synced
before), then the directory is synced, and reading it back syncs the directory too, because what was read is acted upon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftrain.core import journal
from ftrain.core.messages import Attempt

if TYPE_CHECKING:
    from tests.simulator.world import World

JOURNAL = journal.DIRECTORY
TIMED_OUT = "no answer from storage"


@dataclass(slots=True)
class File:
    content: Any
    synced: bool  # its content is durable
    entered: bool  # so is its name


class Storage:
    """The run directory. Every operation calls `reply` exactly once, some virtual time later."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.disk = world.plan.disk
        self.directories: dict[str, dict[str, File]] = {JOURNAL: {}}
        self.entered = {JOURNAL}  # directories whose own entry is durable
        self.cuts = 0  # power cuts so far: an operation that began before one does not go on
        self.out_until = 0.0
        self.sync_directory = True
        self.sync_parent = True
        self.sync_before_read = True
        self.exclusive = True

    # --------------------------------------------------------------------------------------------------- the journal

    def create_record(self, path: str, data: bytes, reply: Callable[[journal.Created], None]) -> None:
        """Create a journal record exclusively and durably."""
        created = journal.Created
        outcome = self._outcome()
        if outcome == "fail":
            self._later(reply, created(path, journal.Outcome.FAILED, "no space left"))
            return
        if outcome in ("lost", "late"):
            self._later(reply, created(path, journal.Outcome.UNKNOWN))
            if outcome == "late":
                self.world.after(self.world.uniform(0.1, 3.0), self._link, path, data, self.cuts, _nobody)
            return
        if outcome == "silent":
            reply = _unknown(reply)
        self.world.after(self._delay(), self._link, path, data, self.cuts, reply)

    def _link(self, path: str, data: bytes, cuts: int, reply: Callable[[journal.Created], None]) -> None:
        if cuts != self.cuts:
            reply(journal.Created(path, journal.Outcome.UNKNOWN))
            return
        records = self.directories[JOURNAL]
        if self.exclusive and path in records:
            reply(journal.Created(path, journal.Outcome.EXISTS))
            return
        records[path] = File(data, synced=True, entered=False)
        self.world.truth.landed(path, data)
        if self.disk.unknown and self.world.random() < self.disk.unknown:  # the directory could not be synced
            reply(journal.Created(path, journal.Outcome.UNKNOWN))
            return
        self.world.after(self._delay(), self._linked, path, cuts, reply)

    def _linked(self, path: str, cuts: int, reply: Callable[[journal.Created], None]) -> None:
        if cuts != self.cuts:
            reply(journal.Created(path, journal.Outcome.UNKNOWN))
            return
        if self.sync_directory:
            self._sync(JOURNAL)
        reply(journal.Created(path, journal.Outcome.CREATED))

    def read_record(self, path: str, reply: Callable[[journal.ReadBack], None]) -> None:
        if self._outcome() in ("fail", "lost"):
            self._later(reply, journal.ReadBack(path, None, known=False))
        else:
            self.world.after(self._delay(), self._read, path, reply)

    def _read(self, path: str, reply: Callable[[journal.ReadBack], None]) -> None:
        if self.sync_before_read:
            self._sync(JOURNAL)
        file = self.directories[JOURNAL].get(path)
        reply(journal.ReadBack(path, file.content if file is not None else None))

    def records(self) -> list[tuple[str, bytes]]:
        """The journal as a coordinator that starts reads it: what it goes by must not be taken back by a power cut."""
        if self.sync_before_read:
            self._sync(JOURNAL)
        return sorted((path, file.content) for path, file in self.directories[JOURNAL].items())

    # ----------------------------------------------------------------------------------------------- checkpoint files

    def write(self, attempt: Attempt, name: str, content: Any, reply: Callable[[str], None]) -> None:
        """Write one file of an attempt durably; `reply` takes the cause of a failure, "" for none."""
        outcome = self._outcome()
        if outcome in ("fail", "lost"):
            self._later(reply, TIMED_OUT)
        elif outcome == "late":
            self._later(reply, TIMED_OUT)
            self.world.after(self.world.uniform(0.1, 3.0), self._write, attempt.path, name, content, self.cuts, _nobody)
        else:
            silent = outcome == "silent"
            then = (lambda _: reply(TIMED_OUT)) if silent else reply
            self.world.after(self._delay(), self._write, attempt.path, name, content, self.cuts, then)

    def _write(self, directory: str, name: str, content: Any, cuts: int, reply: Callable[[str], None]) -> None:
        if cuts != self.cuts:
            reply(TIMED_OUT)
            return
        self.directories.setdefault(directory, {})[name] = File(content, synced=False, entered=False)
        self.world.after(self._delay(), self._written, directory, name, cuts, reply)

    def _written(self, directory: str, name: str, cuts: int, reply: Callable[[str], None]) -> None:
        files = self.directories.get(directory)
        if cuts != self.cuts or files is None or name not in files:
            reply(TIMED_OUT if cuts != self.cuts else "the file is gone")
            return
        files[name].synced = True
        self.world.after(self._delay(), self._finish, directory, cuts, reply)

    def _finish(self, directory: str, cuts: int, reply: Callable[[str], None]) -> None:
        if cuts != self.cuts or directory not in self.directories:
            reply(TIMED_OUT)
            return
        if self.sync_directory:
            self._sync(directory)
        if self.sync_parent:
            self.entered.add(directory)
        reply("")

    def delete(self, attempt: Attempt) -> None:
        self.world.after(self._delay(), self._delete, attempt)

    def _delete(self, attempt: Attempt) -> None:
        if attempt.path in self.directories:
            self.world.truth.deleted(attempt)
            del self.directories[attempt.path]
            self.entered.discard(attempt.path)

    def content(self, attempt: Attempt, name: str) -> Any:
        """What is readable there, None for nothing."""
        file = self.directories.get(attempt.path, {}).get(name)
        return file.content if file is not None else None

    def replace(self, attempt: Attempt, name: str, content: Any) -> None:
        self.directories[attempt.path][name].content = content

    # ------------------------------------------------------------------------------------------------------- faults

    def power_cut(self) -> None:
        """Everything durable stays. Of the rest each thing is there afterwards, or is not."""
        self.cuts += 1
        for directory, files in list(self.directories.items()):
            if directory not in self.entered and self.world.flip():
                del self.directories[directory]
                continue
            self.entered.add(directory)
            for name, file in list(files.items()):
                if not file.entered and self.world.flip():
                    del files[name]
                elif not file.synced and self.world.flip():
                    file.content = "torn"
                    file.synced = file.entered = True
                else:
                    file.synced = file.entered = True
        self.world.truth.power_was_cut()

    def visible_records(self) -> list[tuple[str, bytes]]:
        return sorted((path, file.content) for path, file in self.directories[JOURNAL].items())

    def heal(self) -> None:
        self.disk = type(self.disk)()
        self.out_until = 0.0

    def _sync(self, directory: str) -> None:
        for file in self.directories[directory].values():
            file.entered = True

    def _outcome(self) -> str:
        """ok, fail (did not happen, and said so); with the reply lost: lost (nor will it), late, silent (it did)."""
        if self.world.now < self.out_until:
            return self.world.pick(("fail", "lost", "late"))
        disk = self.disk
        if not (disk.fail or disk.unknown or disk.late):
            return "ok"
        dice = self.world.random()
        if dice < disk.fail:
            return "fail"
        if dice < disk.fail + disk.unknown:
            return self.world.pick(("lost", "silent"))
        return "late" if dice < disk.fail + disk.unknown + disk.late else "ok"

    def _delay(self) -> float:
        slow = self.disk.late and self.world.random() < self.disk.late
        return self.world.uniform(0.5, 4.0) if slow else self.world.uniform(0.005, 0.06)

    def _later(self, reply: Callable[[Any], None], answer: Any) -> None:
        self.world.after(self._delay() * 3, reply, answer)


def _nobody(_: Any) -> None:
    """Takes the reply that was lost."""


def _unknown(reply: Callable[[journal.Created], None]) -> Callable[[journal.Created], None]:
    return lambda created: reply(journal.Created(created.path, journal.Outcome.UNKNOWN))

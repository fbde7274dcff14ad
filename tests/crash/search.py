"""Enumerates what may go wrong in a scene, on a POSIX file system: crashes, errors, and one after the other."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ftrain.checkpoint.written import referred
from ftrain.core.manifest import MANIFEST_PATH, decode_manifest
from ftrain.core.messages import Attempt
from ftrain.errors import FtrainError
from ftrain.storage.base import Storage
from ftrain.storage.posix import PosixStorage
from tests.crash.calls import FAULTS, KILL, Fault, Killed, Recorder
from tests.crash.disk import Disk, State
from tests.crash.judge import Expected, Violation, judge
from tests.crash.life import Life, Stopped, restored
from tests.crash.report import Report

MANY = 1 << 30
STATES_MAX = 1024  # of one moment
OVERSUPPLY = 8  # times the states that are wanted are drawn, where not all are: many of them were judged before
TELL_EVERY = 5000


T = TypeVar("T")
Begin = tuple[State, Expected]  # what is on the disk, durably, and what was promised
Scene = Callable[["Stage"], None]  # what a process does, from the moment that it starts


class Stage:
    """Where a scene plays: a directory with a recorder over it."""

    def __init__(
        self, root: Path, recorder: Recorder, writer: str, opens: Callable[[Path], PosixStorage] = PosixStorage
    ) -> None:
        self.root = root
        self._opens = opens
        self.recorder = recorder
        self.writer = writer
        self._lives = itertools.count()

    def life(self) -> Life:
        return Life(self.storage, f"{self.writer}.{next(self._lives)}", self.recorder.tell)

    def storage(self) -> PosixStorage:
        return self._opens(self.root)


@dataclass(slots=True)
class Run:
    """What a scene did to a state."""

    recorder: Recorder
    before: State
    expected: Expected

    def moments(self) -> Iterator[tuple[Disk, Expected]]:
        """The disk before the first operation and after each, and what had been promised by then."""
        disk, place = Disk(self.before), 0
        told = self.recorder.told
        for number in range(len(self.recorder.ops) + 1):
            if number:
                disk.apply(self.recorder.ops[number - 1])
            while place < len(told) and told[place][0] <= number:
                place += 1
            yield disk, self.expected.after(what for _, what in told[:place])

    @property
    def promised(self) -> Expected:
        return self.expected.after(what for _, what in self.recorder.told)


class Search:
    """Plays scenes and judges what they leave, until the first violation if that is asked for.

    Each class of faults takes `runs`, how many of its cases are drawn (all if there are no more), and `quota`, how many
    of the states that nobody has judged yet are drawn from all of them together (None: every state is judged).
    """

    def __init__(
        self,
        directory: Path,
        seed: int = 0,
        first_violation: bool = False,
        moment_max: int = STATES_MAX,
        progress: Callable[[str], None] = lambda _: None,
        opens: Callable[[Path], PosixStorage] = PosixStorage,
    ) -> None:
        """`opens` gives the run's storage, whose files are all below the path that it is given."""
        self._opens = opens
        self.report = Report()
        self._directory = directory
        self._pool = directory / "contents"
        self._pool.mkdir()
        self._contents: dict[bytes, int] = {}
        self._judged: set[bytes] = set()
        self._proved: set[bytes] = set()
        self._refers: dict[str, list[str]] = {}
        self._went_on: set[bytes] = set()
        self._dice = random.Random(seed)
        self._stops = first_violation
        self._moment_max = moment_max  # states, beyond which so many are drawn
        self._progress = progress

    @property
    def is_over(self) -> bool:
        return self._stops and bool(self.report.violations)

    # ------------------------------------------------------------------------------------------------------ the classes

    def crash(self, name: str, scene: Scene, begin: Begin, quota: int | None = None) -> None:
        """Power is cut at every moment of the scene."""
        self._judge_runs(name, [lambda: (self.play(scene, begin), "")], quota)

    def errors(
        self,
        name: str,
        scene: Scene,
        begin: Begin,
        quota: int | None = None,
        runs: int = MANY,
        kinds: Collection[str] = FAULTS.keys(),
    ) -> None:
        """A call of the scene, of these kinds, fails; the process goes on, and power is cut at every moment."""
        cases = [
            (number, kind, fault)
            for number, kind in enumerate(self.play(scene, begin).recorder.kinds)
            for fault in FAULTS[kind]
            if kind in kinds
        ]

        def one(number: int, kind: str, fault: Fault) -> tuple[Run, str]:
            return self.play(scene, begin, {number: fault}), f"call {number} ({kind}) {fault}"

        self._judge_runs(name, [partial(one, *case) for case in self._some(cases, runs)], quota)

    def kills(
        self,
        name: str,
        scene: Scene,
        then: Scene,
        begin: Begin,
        quota: int | None = None,
        runs: int = MANY,
        kinds: Collection[str] = FAULTS.keys(),
    ) -> None:
        """The process is killed at a call, another takes over at once, and power is cut at every moment."""
        cases = [case for case in enumerate(self.play(scene, begin).recorder.kinds) if case[1] in kinds]

        def one(number: int, kind: str) -> tuple[Run, str]:
            return self.play(scene, begin, {number: KILL}, then), f"killed at call {number} ({kind})"

        self._judge_runs(name, [partial(one, *case) for case in self._some(cases, runs)], quota)

    def overtaken(
        self, name: str, scene: Scene, other: Scene, begin: Begin, quota: int | None = None, runs: int = MANY
    ) -> None:
        """Another process does all of `other` before a call of the scene, which then goes on; power is cut anywhere."""
        cases = list(enumerate(self.play(scene, begin).recorder.kinds))

        def one(number: int, kind: str) -> tuple[Run, str]:
            return self.play(scene, begin, meanwhile=(number, other)), f"overtaken at call {number} ({kind})"

        self._judge_runs(name, [partial(one, *case) for case in self._some(cases, runs)], quota)

    def two_errors(self, name: str, scene: Scene, begin: Begin, quota: int | None, runs: int) -> None:
        """Two calls fail, and power is cut at every moment."""
        kinds = self.play(scene, begin).recorder.kinds

        def one() -> tuple[Run, str]:
            first = self._dice.randrange(len(kinds))
            fault = self._dice.choice(FAULTS[kinds[first]])
            longer = self.play(scene, begin, {first: fault}).recorder.kinds
            second = self._dice.randrange(first, len(longer) - 1) + 1 if first + 1 < len(longer) else first
            other = self._dice.choice(FAULTS[longer[second]])
            what = f"call {first} ({kinds[first]}) {fault}, call {second} ({longer[second]}) {other}"
            return self.play(scene, begin, {first: fault, second: other}), what

        self._judge_runs(name, [one] * runs, quota)

    def crash_in_recovery(
        self, name: str, scene: Scene, then: Scene, begin: Begin, quota: int | None, runs: int, errors: bool = False
    ) -> None:
        """Power is cut in the scene, and again at every moment of the recovery, in which with `errors` a call fails."""
        lefts = {self._mark(*left): left for left in self._states(self.play(scene, begin))}

        def one(left: Begin) -> tuple[Run, str]:
            if not errors:
                return self.play(then, left, name="second"), "a second crash"
            kinds = self.play(then, left, name="second").recorder.kinds
            number = self._dice.randrange(len(kinds))
            fault = self._dice.choice(FAULTS[kinds[number]])
            what = f"a crash, then call {number} ({kinds[number]}) {fault}"
            return self.play(then, left, {number: fault}, name="second"), what

        self._judge_runs(name, [partial(one, left) for left in self._some(list(lefts.values()), runs)], quota)

    def _some(self, cases: list[T], most: int) -> list[T]:
        return cases if len(cases) <= most else self._dice.sample(cases, most)

    # ---------------------------------------------------------------------------------------------------------- playing

    def play(
        self,
        scene: Scene,
        begin: Begin,
        faults: dict[int, Fault] | None = None,
        then: Scene | None = None,
        meanwhile: tuple[int, Scene] | None = None,
        name: str = "first",
    ) -> Run:
        """The scene, with faults at some of its calls; after a kill goes on `then`, in another process."""
        state, expected = begin
        with self._place(state) as root:
            recorder = Recorder(root, name)
            stage = Stage(root, recorder, name, self._opens)
            active = True

            def before(call: int, kind: str) -> Fault | None:
                nonlocal active
                if active and meanwhile is not None and call == meanwhile[0]:
                    active = False
                    _play(meanwhile[1], Stage(root, recorder, f"{name}-other", self._opens))
                return (faults or {}).get(call)

            recorder.before = before
            with recorder.recording():
                _play(scene, stage)
                if then is not None and recorder.dead:
                    recorder.dead = False
                    _play(then, Stage(root, recorder, f"{name}-other", self._opens))
            return Run(recorder, state, expected)

    def _states(self, run: Run, wanted: int = MANY) -> Iterator[tuple[State, Expected]]:
        """Of every moment all states, or as many as may be needed for so many new ones of all moments together."""
        most = min(self._moment_max, OVERSUPPLY * wanted // (len(run.recorder.ops) + 1) + 1)
        for disk, promised in run.moments():
            if disk.count() > most:
                self.report.drawn += 1
            for state in disk.states(most, self._dice):
                yield state, promised

    def _judge_runs(self, name: str, runs: list[Callable[[], tuple[Run, str]]], quota: int | None) -> None:
        for number, play in enumerate(runs):
            if self.is_over:
                return
            run, what = play()
            self.report.runs[name] += 1
            new: dict[bytes, Begin] = {}
            allowed = MANY
            if quota is not None:
                allowed = max(0, quota * (number + 1) // len(runs) - self.report.distinct[name])
            for state, promised in self._states(run, allowed):
                self.report.enumerated[name] += 1
                mark = self._mark(state, promised)
                if mark not in self._judged:
                    new[mark] = (state, promised)
            for mark in self._some(list(new), allowed):
                if self.is_over:
                    return
                self._judged.add(mark)
                self.report.distinct[name] += 1
                self._judge(name, *new[mark], what)
                if sum(self.report.distinct.values()) % TELL_EVERY == 0:
                    self._progress(self.report.line(name))
        self._progress(self.report.line(name))

    def _judge(self, name: str, state: State, promised: Expected, what: str) -> None:
        with self._place(state) as root:
            try:
                judge(
                    lambda: self._opens(root),
                    promised,
                    "judge",
                    self._prove,
                    lambda: self._is_known(root),
                )
            except Violation as violation:
                self.report.violations.append(f"{name}: {what}: {violation}")

    def _prove(self, storage: Storage, attempt: Attempt, manifest_sha256: str) -> None:
        """Equal files are proved once."""
        found = hashlib.blake2b(manifest_sha256.encode(), digest_size=16)
        for path in (attempt.path, *self._referred(storage, attempt, manifest_sha256)):
            if Path(storage.url, path).is_dir():
                _feed_files(found, f"{storage.url}/{path}", path)
        if found.digest() not in self._proved:
            restored(storage, attempt, manifest_sha256)
            self._proved.add(found.digest())

    def _referred(self, storage: Storage, attempt: Attempt, manifest_sha256: str) -> list[str]:
        """The attempts whose files a commit needs beside its own, where its manifest can be read."""
        if manifest_sha256 not in self._refers:
            path = f"{attempt.path}/{MANIFEST_PATH}"
            try:
                packs = decode_manifest(storage.read(path), path).packs
            except FtrainError:
                return []
            self._refers[manifest_sha256] = sorted(other.path for other in referred(packs))
        return self._refers[manifest_sha256]

    def _is_known(self, root: Path) -> bool:
        found = hashlib.blake2b(digest_size=16)
        _feed_files(found, str(root), "")
        is_known = found.digest() in self._went_on
        self._went_on.add(found.digest())
        return is_known

    @contextmanager
    def _place(self, state: State) -> Iterator[Path]:
        """A directory in which the state is."""
        root = self._directory / "run"  # always the same: links name it
        root.mkdir()
        try:
            self._fill(str(root), state)
            yield root
        finally:
            shutil.rmtree(root)

    def _fill(self, directory: str, state: State) -> None:
        for name, child in state:
            path = f"{directory}/{name}"
            if isinstance(child, bytes):
                os.link(self._content(child), path)  # files are never changed, so one of each content will do
            elif isinstance(child, str):
                Path(path).symlink_to(child)
            else:
                Path(path).mkdir()
                self._fill(path, child)

    def _content(self, content: bytes) -> Path:
        path = self._pool / str(self._number(content))
        if not path.exists():
            path.write_bytes(content)
        return path

    def _number(self, content: bytes) -> int:
        return self._contents.setdefault(content, len(self._contents))

    def _mark(self, state: State, promised: Expected) -> bytes:
        """Equal states of which equal things are expected have the same."""
        found = hashlib.blake2b(digest_size=16)
        self._feed(found, state)
        found.update(repr(sorted(promised.acked - promised.retiring)).encode())
        found.update(repr(sorted(promised.submitted)).encode())
        return found.digest()

    def _feed(self, found: Any, state: State) -> None:
        for name, child in state:
            if isinstance(child, bytes):
                found.update(f"{name} {self._number(child)}".encode())
            elif isinstance(child, str):
                found.update(f"{name} -> {child}".encode())
            else:
                found.update(f"{name} / {len(child)} ".encode())
                self._feed(found, child)


@contextmanager
def searching(**options: Any) -> Iterator[Search]:
    """A search in a directory of memory."""
    with tempfile.TemporaryDirectory(prefix="ftrain-crash-", dir=_memory()) as directory:
        yield Search(Path(directory), **options)


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _play(scene: Scene, stage: Stage) -> None:
    with suppress(Killed, Stopped, FtrainError, OSError):
        scene(stage)


def _feed_files(found: Any, directory: str, name: str) -> None:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            _feed_files(found, entry.path, path)
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            found.update(f"{path} leads nowhere ".encode())
            continue
        if status.st_nlink > 1:  # of one content, and never changed
            found.update(f"{path} {status.st_ino} ".encode())
        else:
            found.update(f"{path} {status.st_size} ".encode() + Path(entry.path).read_bytes())

"""The same scenes on an object store: each request is done, refused, or done with its reply lost, or done late.

`MemoryBucket` is a store as S3 promises to be: every request is atomic, what was answered is durable, a conditional
create has one winner. ftrain's `ObjectStorage` runs on it unchanged.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ftrain.core.messages import Attempt
from ftrain.errors import AlreadyExists, FtrainError, NotFound, StorageError, UnknownOutcome
from ftrain.storage.base import Storage
from ftrain.storage.bucket import Found
from ftrain.storage.object_store import ObjectStorage, Patience
from tests.crash.calls import Killed
from tests.crash.judge import Expected, Violation, judge
from tests.crash.life import Life, Stopped, Told, restored
from tests.crash.report import Report

Objects = dict[str, tuple[bytes, str]]  # content and write-id by key
Begin = tuple[Objects, Expected]

# What happens to a request: killed before it, refused, unanswered (not done, done, done later), or told that it exists
# although it was this very request that made it, as after a retry that nobody asked for.
FAULTS: dict[str, tuple[str, ...]] = {
    "put_new": ("refused", "unanswered", "lost", "late", "exists"),
    "put_parts": ("refused", "unanswered", "lost", "refused though done"),
    "delete": ("refused", "half", "refused though done"),
    "get": ("refused",),
    "look": ("refused",),
    "names": ("refused",),
    "keys": ("refused",),
}
_LATE = 3  # requests after which a late one is done
_PART_BYTES = 8192  # so that one of the two packs goes up in parts


class MemoryBucket:
    """A bucket in memory. It notes what is there after each request, and what was said by then."""

    def __init__(self, objects: Objects) -> None:
        self.objects = dict(objects)
        self.moments: list[tuple[Objects, int]] = [(dict(objects), 0)]
        self.kinds: list[str] = []
        self.told: list[Told] = []
        self.before: Callable[[int], str | None] = lambda _: None
        self.dead = False
        self._late: list[tuple[int, str, bytes, str]] = []

    @property
    def url(self) -> str:
        return "memory://bucket"

    def put_new(self, key: str, data: bytes, write_id: str) -> None:
        def do() -> None:
            if key in self.objects:
                raise AlreadyExists(f"{key} exists already")
            self.objects[key] = (data, write_id)

        fault = self._made("put_new", do)
        if fault == "late":
            self._late.append((len(self.kinds) + _LATE, key, data, write_id))

    def put_parts(self, key: str, parts: Iterable[memoryview], part_bytes: int, write_id: str) -> None:
        data = b"".join(bytes(part) for part in parts)
        assert part_bytes == _PART_BYTES
        self._made("put_parts", lambda: self.objects.update({key: (data, write_id)}))

    def get(self, key: str) -> bytes:
        self._made("get", lambda: None)
        return self._find(key)[0]

    def get_range(self, key: str, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._find(key)[0])[offset : offset + nbytes]

    def look(self, key: str) -> Found:
        self._made("look", lambda: None)
        data, write_id = self._find(key)
        return Found(len(data), write_id)

    def names(self, prefix: str) -> tuple[list[str], list[str]]:
        self._made("names", lambda: None)
        start = f"{prefix}/" if prefix else ""
        rest = [key[len(start) :] for key in self.objects if key.startswith(start)]
        return [name for name in rest if "/" not in name], sorted({name.split("/")[0] for name in rest if "/" in name})

    def keys(self, prefix: str, count_max: int | None = None) -> list[str]:
        self._made("keys", lambda: None)
        return sorted(key for key in self.objects if not prefix or key.startswith(f"{prefix}/"))[:count_max]

    def delete(self, keys: Sequence[str]) -> None:
        def do(most: int = len(keys)) -> None:
            for key in list(keys)[:most]:
                self.objects.pop(key, None)
                self._note()

        self._made("delete", do, lambda: do(len(keys) // 2))

    def abort_uploads(self, prefix: str) -> int:
        assert not prefix.startswith("/")
        return 0  # an upload that was not ended leaves nothing here

    def tell(self, what: Told) -> None:
        self.told.append(what)
        self._note()

    def _find(self, key: str) -> tuple[bytes, str]:
        if key not in self.objects:
            raise NotFound(f"{key} is not there")
        return self.objects[key]

    def _made(self, kind: str, do: Callable[[], None], half: Callable[[], None] = lambda: None) -> str:
        if self.dead:
            raise Killed
        number = len(self.kinds)
        self.kinds.append(kind)
        self._land(number)
        fault = self.before(number) or ""
        if fault == "killed":
            self.dead = True
            raise Killed
        if fault in ("", "lost", "exists", "refused though done"):
            do()
        elif fault == "half":
            half()
        self._note()
        match fault:
            case "refused" | "refused though done" | "half":
                raise StorageError(f"{kind} was refused")
            case "exists":
                raise AlreadyExists("it exists already")
            case "lost" | "unanswered":
                raise UnknownOutcome(f"no answer to {kind}")
        if fault == "late":
            return fault
        return ""

    def _land(self, number: int) -> None:
        for late in [one for one in self._late if one[0] <= number]:
            self._late.remove(late)
            self.objects.setdefault(late[1], late[2:])
            self._note()

    def _note(self) -> None:
        self.moments.append((dict(self.objects), len(self.told)))


class _LateBucket(MemoryBucket):
    """Says that nobody knows when a create is late."""

    def put_new(self, key: str, data: bytes, write_id: str) -> None:
        waiting = len(self._late)
        super().put_new(key, data, write_id)
        if len(self._late) > waiting:
            raise UnknownOutcome("no answer to put_new")


class StoreStage:
    """Where a scene plays."""

    def __init__(self, bucket: MemoryBucket, writer: str) -> None:
        self._bucket = bucket
        self._writer = writer
        self._lives = itertools.count()

    def life(self) -> Life:
        return Life(lambda: _storage(self._bucket), f"{self._writer}.{next(self._lives)}", self._bucket.tell)


Scene = Callable[[Any], None]


class StoreSearch:
    """Plays scenes on a store and judges what they leave. `quota` as in `search.Search`."""

    def __init__(self, seed: int = 0, first_violation: bool = False, progress: Callable[[str], None] = print) -> None:
        self.report = Report()
        self._dice = random.Random(seed)
        self._stops = first_violation
        self._progress = progress
        self._judged: set[bytes] = set()
        self._proved: set[bytes] = set()
        self._went_on: set[bytes] = set()

    def play(
        self,
        scene: Scene,
        begin: Begin,
        faults: dict[int, str] | None = None,
        then: Scene | None = None,
        meanwhile: tuple[int, Scene] | None = None,
        name: str = "first",
    ) -> MemoryBucket:
        bucket = _LateBucket(begin[0])
        active = True

        def before(number: int) -> str | None:
            nonlocal active
            if active and meanwhile is not None and number >= meanwhile[0]:
                active = False
                _play(meanwhile[1], StoreStage(bucket, f"{name}-other"))
            return (faults or {}).get(number)

        bucket.before = before
        _play(scene, StoreStage(bucket, name))
        if then is not None and bucket.dead:
            bucket.dead = False
            _play(then, StoreStage(bucket, f"{name}-other"))
        return bucket

    def begin(self, *before: Scene) -> Begin:
        """What is there, and what was promised, after these scenes in a row."""
        begin: Begin = ({}, Expected())
        for number, scene in enumerate(before):
            bucket = self.play(scene, begin, name=f"begin{number}")
            begin = (bucket.objects, begin[1].after(bucket.told))
        return begin

    def crash(self, name: str, scene: Scene, begin: Begin) -> None:
        """Everything ends after each request."""
        self._judge_runs(name, begin, [lambda: (self.play(scene, begin), "")])

    def errors(self, name: str, scene: Scene, begin: Begin, count: int = 1, runs: int = 1 << 30) -> None:
        """`count` requests fail in some way, all combinations of two in a row of faults; then as `crash`."""
        unhurt = self.play(scene, begin)
        kinds, commits = unhurt.kinds, any(told.what == "acked" for told in unhurt.told)
        cases: list[dict[int, str]] = [{}]
        for _ in range(count):
            cases = [longer for case in cases for longer in self._with_one_more(scene, begin, case)]
        chosen = cases if len(cases) <= runs else self._dice.sample(cases, runs)

        def one(faults: dict[int, str]) -> tuple[MemoryBucket, str]:
            bucket = self.play(scene, begin, faults)
            if commits and count == 1 and all(_is_harmless(kinds[number], fault) for number, fault in faults.items()):
                self._check_patience(name, bucket, faults)
            return bucket, str(faults)

        self._judge_runs(name, begin, [partial(one, faults) for faults in chosen])

    def kills(self, name: str, scene: Scene, then: Scene, begin: Begin) -> None:
        """The process is killed at each request, another takes over, and everything ends after each request of it."""
        calls = range(len(self.play(scene, begin).kinds))
        runs = [partial(self._killed, scene, then, begin, number) for number in calls]
        self._judge_runs(name, begin, runs)

    def overtaken(self, name: str, scene: Scene, other: Scene, begin: Begin) -> None:
        """Another process does all of `other` before each request of the scene, which then goes on."""
        calls = range(len(self.play(scene, begin).kinds))

        def one(number: int) -> tuple[MemoryBucket, str]:
            return self.play(scene, begin, meanwhile=(number, other)), f"overtaken at request {number}"

        self._judge_runs(name, begin, [partial(one, number) for number in calls])

    def crash_in_recovery(self, name: str, scene: Scene, then: Scene, begin: Begin, with_errors: bool) -> None:
        """Everything ends after each request of the scene, and after each of the recovery, with one of them failing."""
        progress, self._progress = self._progress, lambda _: None
        for left in dict(self._moments(self.play(scene, begin), begin[1])).values():
            if with_errors:
                self.errors(name, then, left)
            else:
                self.crash(name, then, left)
        self._progress = progress
        progress(self.report.line(name))

    def _killed(self, scene: Scene, then: Scene, begin: Begin, number: int) -> tuple[MemoryBucket, str]:
        return self.play(scene, begin, {number: "killed"}, then), f"killed at request {number}"

    def _with_one_more(self, scene: Scene, begin: Begin, case: dict[int, str]) -> Iterator[dict[int, str]]:
        kinds = self.play(scene, begin, case).kinds
        for number in range(max(case, default=-1) + 1, len(kinds)):
            for fault in FAULTS[kinds[number]]:
                yield {**case, number: fault}

    def _check_patience(self, name: str, bucket: MemoryBucket, faults: dict[int, str]) -> None:
        submitted = [told.attempt for told in bucket.told if told.what == "submitted"]
        acked = [told.attempt for told in bucket.told if told.what == "acked"]
        if not acked or submitted[0] != acked[0] or (acked[0] is not None and acked[0].number != 1):
            self.report.violations.append(f"{name}: {faults}: an attempt was given up, though only a reply was lost")

    def _judge_runs(self, name: str, begin: Begin, runs: list[Callable[[], tuple[MemoryBucket, str]]]) -> None:
        for play in runs:
            bucket, what = play()
            self.report.runs[name] += 1
            for mark, (objects, promised) in self._moments(bucket, begin[1]):
                if self._stops and self.report.violations:
                    return
                self.report.enumerated[name] += 1
                if mark not in self._judged:
                    self._judged.add(mark)
                    self.report.distinct[name] += 1
                    self._judge(name, objects, promised, what)
        self._progress(self.report.line(name))

    def _moments(self, bucket: MemoryBucket, expected: Expected) -> Iterator[tuple[bytes, Begin]]:
        for objects, told in bucket.moments:
            promised = expected.after(bucket.told[:told])
            found = hashlib.blake2b(_mark(objects), digest_size=16)
            found.update(repr((sorted(promised.acked - promised.retiring), sorted(promised.submitted))).encode())
            yield found.digest(), (objects, promised)

    def _judge(self, name: str, objects: Objects, promised: Expected, what: str) -> None:
        bucket = MemoryBucket(objects)

        def prove(storage: Storage, attempt: Attempt, manifest_sha256: str) -> None:
            files = {key: one for key, one in bucket.objects.items() if key.startswith(f"{attempt.path}/")}
            mark = _mark(files) + manifest_sha256.encode()
            if mark not in self._proved:
                restored(storage, attempt, manifest_sha256)
                self._proved.add(mark)

        def is_known() -> bool:
            mark = _mark(bucket.objects)
            known = mark in self._went_on
            self._went_on.add(mark)
            return known

        try:
            judge(lambda: _storage(bucket), promised, "judge", prove, is_known)
        except Violation as violation:
            self.report.violations.append(f"{name}: {what}: {violation}")


class _SmallParts(ObjectStorage):
    """Sends packs of more than a few KiB in parts, where the real one does so from 1 MiB on."""

    def _part_bytes_of(self, nbytes: int) -> int:
        del nbytes
        return _PART_BYTES


def _storage(bucket: MemoryBucket) -> ObjectStorage:
    return _SmallParts(bucket, patience=Patience(3, 0.0, 0.0))


def _is_harmless(kind: str, fault: str) -> bool:
    """Of this alone no attempt may be given up. An upload that was not done and said nothing is not begun anew."""
    return fault in ("lost", "exists", "late") or (kind == "put_new" and fault == "unanswered")


def _mark(objects: Objects) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for key in sorted(objects):
        data = objects[key][0]
        found.update(f"{key} {len(data)} ".encode() + data)
    return found.digest()


def _play(scene: Scene, stage: StoreStage) -> None:
    with suppress(Killed, Stopped, FtrainError):
        scene(stage)

"""The measurements of one workload. In each repeat every subject has its turn, with a limit measured before and after.

So a disk that drifts hits all alike, and a ratio compares a measurement with the mean of the two limits next to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from files import drop_cache, fill_cache, remove
from states import Workload
from subjects import Subject
from team import FailedError, Team

PHASES = ("save", "load", "arena", "stall", "train", "memory")
COMPUTE_OVER_COPY = 4  # how much longer than a memcpy of the state the compute phase of a step is
COMPUTE_SECONDS_MIN = 0.25


@dataclass(frozen=True)
class Record:
    """One measurement: what was measured, of whom, in which repeat, and the figures, all in seconds or bytes."""

    workload: str
    measure: str
    subject: str
    repeat: int
    values: dict[str, Any]
    limits: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """A subject that was left out from here on, and why."""

    workload: str
    phase: str
    subject: str
    reason: str


class LimitError(Exception):
    """A limit could not be measured, so there is nothing to compare with."""


class Bench:
    """All phases of one workload, with the process trees of the subjects that take part."""

    def __init__(
        self, workload: Workload, subjects: list[Subject], folder: Path, repeats: int, bound_seconds: float, steps: int
    ) -> None:
        self.workload = workload
        self.records: list[Record] = []
        self.failures: list[Failure] = []
        self.dropped_by = ""  # what emptied the page cache before cold loads
        self._subjects = subjects
        self._folder = folder
        self._repeats = repeats
        self._steps = steps
        self._bytes = [workload.bytes_of(rank) for rank in range(workload.ranks)]
        self._limits = Team("limits", workload.ranks, folder / "limits", bound_seconds)
        self._teams = {
            subject.name: Team(subject.name, workload.ranks, folder / f"subject{number}", bound_seconds)
            for number, subject in enumerate(subjects)
        }

    def run(self, phase: str) -> None:
        """One of PHASES. What fails is in `failures` afterwards."""
        {
            "save": self._save,
            "load": self._load,
            "arena": self._arena,
            "stall": self._stall,
            "train": self._train,
            "memory": self._memory,
        }[phase]()

    @property
    def total_bytes(self) -> int:
        """The bytes of the state on all ranks."""
        return sum(self._bytes)

    def close(self) -> None:
        """End every process."""
        for team in (self._limits, *self._teams.values()):
            team.stop()

    def _save(self) -> None:
        limit = Neighbours(lambda: {"direct write": self._limit("direct_write", path=str(self._folder / "limit"))})
        for subject, team, repeat in self._turns("save"):
            path = self._folder / "save"
            limit.before()
            with self._reporting("save", subject, path):
                team.ask("open", workload=self.workload.as_json(), cleared=False)
                timing = team.time("save", path=str(path))
                team.ask("close")
                remove(path)
                self._record("save", subject.name, repeat, asdict(timing), limit.around())
        self._limit_records("save", limit)
        remove(self._folder / "limit")

    def _load(self) -> None:
        """Cold, then warm. Each is checked once, in the first repeat."""
        limit_path = str(self._folder / "limit")
        self._limit("direct_write", path=limit_path)
        paths = {subject.name: self._folder / f"load{number}" for number, subject in enumerate(self._subjects)}
        digests: dict[str, list[int]] = {}
        cold = Neighbours(lambda: {"direct read": self._limit("direct_read", path=limit_path)})
        warm = Neighbours(lambda: {"page cache": self._cached_read(limit_path)})
        for subject, team, repeat in self._turns("load"):
            path = paths[subject.name]
            with self._reporting("load", subject, path, keep=True):
                if subject.name not in digests:
                    team.ask("open", workload=self.workload.as_json(), cleared=False)
                    digests[subject.name] = [answer["digest"] for answer in team.ask("digest")]
                    team.time("save", path=str(path))
                    team.ask("close")
                team.ask("open", workload=self.workload.as_json(), cleared=True)
                for measure, limit in (("load cold", cold), ("load warm", warm)):
                    limit.before(anew=True)
                    if limit is cold:
                        self.dropped_by = drop_cache(path)
                    else:
                        fill_cache(path)
                    timing = team.time("load", path=str(path))
                    limits = limit.around()
                    if repeat == 0:
                        self._check(team, digests[subject.name])
                    self._record(measure, subject.name, repeat, asdict(timing), limits)
                    team.ask("clear")
                team.ask("close")
        for limit in (cold, warm):
            self._limit_records("load", limit)
        for path in (*paths.values(), self._folder / "limit"):
            remove(path)

    def _arena(self) -> None:
        """Each rank from an arena of its own, at about the same time."""
        for subject, team, repeat in self._turns("arena"):
            path = self._folder / "arena"
            with self._reporting("arena", subject, path):
                team.ask("open", workload=self.workload.as_json(), cleared=False)
                answers = team.ask("held", path=str(path), check=repeat == 0)
                team.ask("close")
                slowest = max(answers, key=lambda answer: float(answer["seconds"]))
                self._record("arena", subject.name, repeat, slowest, {"memcpy": slowest["memcpy"]})

    def _stall(self) -> None:
        matmuls = self._matmuls()
        limit = Neighbours(
            lambda: {
                "memcpy": self._limit("memcpy", shared=False),
                "memcpy into shared": self._limit("memcpy", shared=True),
            }
        )
        for subject, team, repeat in self._turns("stall"):
            path = self._folder / "stall"
            limit.before()
            with self._reporting("stall", subject, path):
                team.ask("open", workload=self.workload.as_json(), cleared=False)
                answers = team.ask("stall", path=str(path), matmuls=matmuls, check=repeat == 0)
                team.ask("close")
                remove(path)
                self._record("stall", subject.name, repeat, worst_of(answers), limit.around())
        self._limit_records("stall", limit)

    def _train(self) -> None:
        matmuls = self._matmuls()
        for subject, team, repeat in self._turns("train"):
            path = self._folder / "train"
            with self._reporting("train", subject, path):
                team.ask("open", workload=self.workload.as_json(), cleared=False)
                answers = team.ask("train", path=str(path), matmuls=matmuls, steps=self._steps)
                team.ask("close")
                remove(path)
                # The ranks step together, so one rank's series is that of all.
                self._record("train", subject.name, repeat, answers[0])

    def _memory(self) -> None:
        """Once per size, for what is allocated does not vary."""
        for part in (0.5, 1.0):
            workload = Workload(
                self.workload.kind, self.workload.dtype, self.workload.ranks, self.workload.scale * part
            )
            for subject, team, repeat in self._turns("memory", 1):
                path = self._folder / "memory"
                with self._reporting("memory", subject, path):
                    team.ask("open", workload=workload.as_json(), cleared=False)
                    answers = team.ask("memory", path=str(path))
                    team.stop()  # the next size begins with a process that has allocated nothing
                    remove(path)
                    state = sum(workload.bytes_of(rank) for rank in range(workload.ranks))
                    sums = {name: sum(answer[name] for answer in answers) for name in answers[0]}
                    self._record("memory", subject.name, repeat, {"state": state, **sums})

    def _turns(self, phase: str, repeats: int = 0) -> Iterator[tuple[Subject, Team, int]]:
        """A B C A B C ..., without those that have failed in this phase."""
        for repeat in range(repeats or self._repeats):
            for subject in self._subjects:
                if phase in subject.phases and not self._has_failed(phase, subject.name):
                    yield subject, self._teams[subject.name], repeat

    @contextlib.contextmanager
    def _reporting(self, phase: str, subject: Subject, path: Path, keep: bool = False) -> Iterator[None]:
        """Turn a failure of the subject into a line of the report. `keep` leaves what it saved for its next turn."""
        try:
            yield
        except FailedError as error:
            self.failures.append(Failure(str(self.workload), phase, subject.name, str(error)))
            self._teams[subject.name].stop()
            keep = False
        if not keep:
            remove(path)

    def _has_failed(self, phase: str, name: str) -> bool:
        return any(failure.phase == phase and failure.subject == name for failure in self.failures)

    def _record(
        self, measure: str, subject: str, repeat: int, values: dict[str, Any], limits: dict[str, float] | None = None
    ) -> None:
        self.records.append(Record(str(self.workload), measure, subject, repeat, values, limits or {}))

    def _limit_records(self, phase: str, limit: Neighbours) -> None:
        for number, values in enumerate(limit.history):
            for name, seconds in values.items():
                self._record(f"limit of {phase}", name, number, {"seconds": seconds})

    def _limit(self, do: str, **arguments: Any) -> float:
        """Seconds of a limit, over the bytes of the state. The ranks do their parts at the same time."""
        try:
            return self._limits.time(do, size=max(self._bytes), **arguments).seconds
        except FailedError as error:
            raise LimitError(f"the limit {do} could not be measured: {error}") from error

    def _cached_read(self, path: str) -> float:
        fill_cache(Path(path))
        return self._limit("cached_read", path=path)

    def _check(self, team: Team, expected: list[int]) -> None:
        if [answer["digest"] for answer in team.ask("digest")] != expected:
            raise FailedError("the bytes that it loaded are not those that it saved")

    def _matmuls(self) -> int:
        """The products of a step: so many that they take longer than a copy of the state."""
        seconds = max(COMPUTE_SECONDS_MIN, COMPUTE_OVER_COPY * self._limit("memcpy", shared=True))
        slowest = min(answer["matmuls_per_second"] for answer in self._limits.ask("calibrate"))
        return max(1, round(seconds * float(slowest)))


class Neighbours:
    """Limits measured between the turns: what is measured after one turn is what was before the next."""

    def __init__(self, measure: Callable[[], dict[str, float]]) -> None:
        self.history: list[dict[str, float]] = []
        self._measure = measure
        self._is_fresh = False

    def before(self, anew: bool = False) -> None:
        """Measure before a turn; not again if that was done after the turn before, unless `anew`."""
        if anew or not self._is_fresh:
            self.history.append(self._measure())
        self._is_fresh = False

    def around(self) -> dict[str, float]:
        """Measure after a turn; the mean of this and of what was measured before it."""
        before = self.history[-1]
        self.history.append(self._measure())
        self._is_fresh = True
        return {name: (before[name] + after) / 2 for name, after in self.history[-1].items()}


def worst_of(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest of each figure over the ranks: the slowest rank holds up all."""
    return {name: max(answer[name] for answer in answers) for name in answers[0]}

"""The figures of one workload as markdown tables: medians, and the smallest and largest in brackets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from phases import Failure, Record
from subjects import Subject

GB = 1e9


@dataclass(frozen=True)
class Report:
    """All that was measured of one workload of `total_bytes`."""

    title: str
    total_bytes: int
    tensors: int
    dropped_by: str
    records: list[Record]
    failures: list[Failure]
    subjects: list[Subject]

    def __str__(self) -> str:
        head = f"## {self.title}: {self.total_bytes / GB:.3f} GB in {self.tensors} tensors"
        sections = [
            self._limits(),
            self._save(),
            *self._loads(),
            self._arena(),
            self._stall(),
            self._train(),
            self._memory(),
        ]
        return "\n\n".join([head, *filter(None, [*sections, self._failures()])])

    def _of(self, measure: str) -> dict[str, list[Record]]:
        """The records of a measure by subject, in the order of the subjects' first turns."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            if record.measure == measure:
                found.setdefault(record.subject, []).append(record)
        return found

    def _limits(self) -> str:
        phases = dict.fromkeys(r.measure for r in self.records if r.measure.startswith("limit of "))
        rows = [
            [
                phase.removeprefix("limit of "),
                name,
                spread(seconds, "s"),
                f"{self._speed(seconds):.2f} GB/s",
                str(len(found)),
            ]
            for phase in phases
            for name, found in self._of(phase).items()
            for seconds in [[record.values["seconds"] for record in found]]
        ]
        return table("Limits", ["beside", "limit", "time", "median speed", "times measured"], rows)

    def _save(self) -> str:
        about = {subject.name: subject for subject in self.subjects}
        rows = [
            [
                name,
                spread([r.values["seconds"] for r in found], "s"),
                f"{self._speed([r.values['seconds'] for r in found]):.2f} GB/s",
                percents(r.limits["direct write"] / r.values["seconds"] for r in found),
                self._cpu(found),
                about[name].checksum,
                about[name].durable,
            ]
            for name, found in self._of("save").items()
        ]
        head = ["", "wall time", "speed", "of the direct-write limit", "CPU a GB", "checksum", "made durable"]
        return table("Durable save", head, rows)

    def _loads(self) -> list[str]:
        kinds = {
            "load cold": (f"Load, cold ({self.dropped_by})", "direct read"),
            "load warm": ("Load, warm (files in the page cache)", "page cache"),
        }
        return [self._load(measure, title, limit) for measure, (title, limit) in kinds.items()]

    def _load(self, measure: str, title: str, limit: str) -> str:
        rows = [
            [
                name,
                spread([r.values["seconds"] for r in found], "s"),
                f"{self._speed([r.values['seconds'] for r in found]):.2f} GB/s",
                percents(r.limits[limit] / r.values["seconds"] for r in found),
                self._cpu(found),
            ]
            for name, found in self._of(measure).items()
        ]
        return table(title, ["", "wall time", "speed", f"of the {limit} limit", "CPU a GB"], rows)

    def _arena(self) -> str:
        rows = [
            [
                name,
                spread([r.values["seconds"] for r in found], "s"),
                spread([r.limits["memcpy"] for r in found], "s"),
                percents(r.limits["memcpy"] / r.values["seconds"] for r in found),
            ]
            for name, found in self._of("arena").items()
        ]
        return table("Restore from the arena", ["", "wall time", "memcpy by one thread", "of memcpy"], rows)

    def _stall(self) -> str:
        def over_copy(found: list[Record], which: str, limit: str) -> str:
            return percents(blocked(record, which) / record.limits[limit] for record in found)

        rows = [
            [
                name,
                spread([blocked(r, "idle") for r in found], "ms"),
                over_copy(found, "idle", "memcpy"),
                over_copy(found, "idle", "memcpy into shared"),
                spread([blocked(r, "overlap") for r in found], "ms"),
                over_copy(found, "overlap", "memcpy"),
                spread([r.values["overlap_step"] - r.values["plain_step"] for r in found], "ms"),
                spread([r.values["plain_step"] for r in found], "ms"),
                spread([r.values["idle_saved"] for r in found], "s"),
            ]
            for name, found in self._of("stall").items()
        ]
        head = [
            "",
            "blocked, nothing to overlap",
            "of memcpy",
            "of memcpy into shared memory",
            "blocked, overlapping compute",
            "of memcpy",
            "that step is longer by",
            "a plain step",
            "saved after",
        ]
        return table("Stall of the training thread: in the call and in the optimizer's wait", head, rows)

    def _train(self) -> str:
        rows, series = [], []
        for name, found in self._of("train").items():
            rows.append(
                [
                    name,
                    spread([statistics.median(r.values["plain"]) for r in found], "ms"),
                    spread([statistics.median(r.values["saving"]) for r in found], "ms"),
                    percents(throughput(r) for r in found),
                    spread([lost_seconds(r) for r in found], "s"),
                ]
            )
            for record in found:
                for label in ("plain", "saving"):
                    steps = " ".join(f"{seconds * 1000:.0f}" for seconds in record.values[label])
                    series.append(f"    {name}, {record.repeat}, {label}: {steps}")
        head = ["", "median step without", "median step while saving", "throughput while saving", "lost per save"]
        made = table("Training while a checkpoint is persisted: from the call until it is committed", head, rows)
        return "\n\n".join([made, "Step times in ms, by repeat:", "\n".join(series)]) if rows else ""

    def _memory(self) -> str:
        rows = [
            [name, *(f"{r.values[field] / GB:.3f} GB" for field in ("state", "standing", "save", "load"))]
            for name, found in self._of("memory").items()
            for r in found
        ]
        head = ["", "state", "kept between saves", "peak of a save over that", "peak of a load over that"]
        return table("Resident memory beside the state (mapped files count, the page cache does not)", head, rows)

    def _failures(self) -> str:
        lines = [f"- {f.phase}: {f.subject} is left out: {f.reason}" for f in self.failures]
        return "### Left out\n\n" + "\n".join(lines) if lines else ""

    def _speed(self, seconds: list[float]) -> float:
        return self.total_bytes / GB / statistics.median(seconds)

    def _cpu(self, found: list[Record]) -> str:
        return spread([r.values["cpu_seconds"] / (self.total_bytes / GB) for r in found], "s")


def blocked(record: Record, which: str) -> float:
    call, wait = record.values[f"{which}_call"], record.values[f"{which}_wait"]
    assert isinstance(call, float) and isinstance(wait, float)
    return call + wait


def throughput(record: Record) -> float:
    """Steps a second while saving, over those without."""
    plain, saving = record.values["plain"], record.values["saving"]
    return statistics.fmean(plain) / statistics.fmean(saving)


def lost_seconds(record: Record) -> float:
    """How much longer the steps took while saving, together."""
    plain, saving = record.values["plain"], record.values["saving"]
    return float(sum(saving) - len(saving) * statistics.fmean(plain))


def spread(values: list[float], unit: str) -> str:
    """Median (smallest-largest); values are seconds."""
    factor, digits = (1000, 1) if unit == "ms" else (1, 3)
    numbers = [statistics.median(values), min(values), max(values)]
    median, low, high = (f"{number * factor:.{digits}f}" for number in numbers)
    return f"{median} {unit} ({low} to {high})"


def percents(ratios: Iterable[float]) -> str:
    """The median of the ratios (smallest-largest)."""
    values = [ratio * 100 for ratio in ratios]
    show: Callable[[float], str] = lambda value: f"{value:.1f}" if value < 100 else f"{value:.0f}"  # noqa: E731
    return f"{show(statistics.median(values))}% ({show(min(values))} to {show(max(values))})"


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A markdown table under its title, nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

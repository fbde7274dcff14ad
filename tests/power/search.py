"""Cuts the power at flush points of a recorded run, mounts what is left, and judges the run directory in it.

From some of the cuts a real run goes on, on a disk that is recorded again: then the power is cut there a second time.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import ftrain
from ftrain.checkpoint.catalogue import Commit
from ftrain.checkpoint.tools.verify import verify
from ftrain.core.messages import Attempt
from ftrain.storage import open_storage
from ftrain.storage.base import Storage
from tests.crash.judge import Violation, judge
from tests.crash.life import restored
from tests.power import train
from tests.power.cuts import Cut, Disk, cuts_at, expected_at, flush_points
from tests.power.file_system import mounted
from tests.power.files import copy_sparse
from tests.power.run import Recording, RunFailed, record_run

STEPS_FURTHER = 2 * train.STEPS_PER_COMMIT
SECOND_POINTS = 10


@dataclass(slots=True)
class Report:
    """What was done, and what was lost."""

    points: int = 0
    cuts: int = 0
    second_cuts: int = 0  # while a run went on after a first one
    commits: int = 0  # proved, over all cuts
    resumed: int = 0  # by a real run, to its end
    losses: list[str] = field(default_factory=list)

    def text(self) -> str:
        return (
            f"{self.points} flush points, {self.cuts} power cuts, {self.second_cuts} second cuts, {self.commits} "
            f"commits proved, {self.resumed} runs gone on with, {len(self.losses)} losses"
        )


class Search:
    """Over one recording. `place` is an empty folder for disks."""

    def __init__(self, recording: Recording, place: Path, seed: int = 0) -> None:
        self._recording = recording
        self._place = place
        self._dice = random.Random(seed)
        self._second_points = SECOND_POINTS
        self.report = Report()

    def run(
        self,
        points_max: int | None = None,
        resumes: int = 0,
        progress: Callable[[str], None] = lambda _: None,
        *,
        second_points: int = SECOND_POINTS,
        first_loss: bool = False,
    ) -> Report:
        """At so many flush points, drawn by the seed, or at all; from `resumes` of the cuts a real run goes on.

        Then the power is cut again, at `second_points` flush points of what that run did.
        """
        self._second_points = second_points
        entries = self._recording.entries
        points = flush_points(entries)
        if points_max is not None and points_max < len(points):
            points = sorted(self._dice.sample(points, points_max))
        image = self._place / "durable"
        copy_sparse(self._recording.image, image)
        disk = Disk(image, entries, self._recording.kind.sector_bytes)
        cuts = [cut for point in points for cut in cuts_at(point, self._dice)]
        to_resume = set(self._dice.sample(range(len(cuts)), min(resumes, len(cuts))))
        for number, cut in enumerate(cuts):
            self.report.cuts += 1
            self.report.points += cut.how == "all"
            target = self._place / "cut"
            disk.after(cut, target, self._dice)
            try:
                self._judge(cut, target, number in to_resume)
            except (Violation, RunFailed) as error:
                self.report.losses.append(f"{cut}: {error}")
                if first_loss:
                    break
            if cut.how == "all" and self.report.points % 50 == 0:
                progress(self.report.text())
        return self.report

    def _judge(self, cut: Cut, device: Path, resume: bool) -> None:
        """Raises `Violation`, `RunFailed`."""
        try:
            if resume:
                self._go_on(cut, device)
                return
            with mounted(self._recording.kind, device, self._place / "disk") as disk:
                self._prove(cut, disk / "run")
        except subprocess.CalledProcessError as error:
            raise Violation(f"{' '.join(error.cmd)}: {error.stderr.decode(errors='replace').strip()}") from None

    def _prove(self, cut: Cut, run: Path) -> None:
        expected = expected_at(self._recording, cut.end)
        known = expected.acked | expected.submitted
        proved: set[Attempt] = set()

        def prove(storage: Storage, attempt: Attempt, manifest_sha256: str) -> None:
            if attempt not in known:  # the judge's own, made to see that the run can go on
                restored(storage, attempt, manifest_sha256)
                return
            verify(Commit(storage, attempt.path, attempt, 0, 0, manifest_sha256))
            if self._load(run, attempt) != self._recording.digests[attempt.step]:
                raise Violation(f"{attempt} is whole, but it is not the state of its step")
            proved.add(attempt)

        judge(lambda: open_storage(str(run)), expected, f"power-{cut.end}-{cut.how}", prove)
        self.report.commits += len(proved)

    def _load(self, run: Path, attempt: Attempt) -> str:
        model, optimizer = train.build()
        ftrain.load(run / attempt.path, {"model": model, "optimizer": optimizer})
        return train.digest(model, optimizer)

    def _go_on(self, cut: Cut, device: Path) -> None:
        """A real run, some steps further than it was ever told to have come, and the power cut once more in it."""
        known = self._recording.digests
        expected = expected_at(self._recording, cut.end)
        newest = max((attempt.step for attempt in expected.acked), default=0)
        with tempfile.TemporaryDirectory(dir=self._place, prefix="again-") as directory:
            place = Path(directory)
            device.rename(place / "image")
            more = record_run(self._recording.kind, place, newest + STEPS_FURTHER)
            for step, digest in more.digests.items():
                if step <= newest:
                    raise Violation(f"step {step} was done again, although step {newest} was committed")
                if known.get(step, digest) != digest:
                    raise Violation(f"step {step} came out differently after the cut")
            self.report.resumed += 1
            again = replace(more, digests={**known, **more.digests}, before=expected)
            found = Search(again, place, self._dice.getrandbits(32)).run(self._second_points)
            self.report.second_cuts += found.cuts
            self.report.commits += found.commits
            self.report.losses += [f"{cut}, and then {loss}" for loss in found.losses]

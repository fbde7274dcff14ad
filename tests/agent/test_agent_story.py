"""The story of a run costs the run nothing when it cannot be written."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ftrain.agent.story import Story
from ftrain.core.messages import Metrics
from ftrain.core.run_state import Measured


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def measure(story: Story, step: int) -> None:
    story.tell(Measured(Metrics(1, step, {"loss": 0.5})))


def test_full_disk_is_said_once_and_not_for_each_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    story = Story(tmp_path)
    for step in range(5):
        measure(story, step)
    assert warnings(caplog) == [f"{tmp_path / 'metrics.jsonl'} cannot be written: No space left on device"]
    story.close()


def test_directory_that_is_gone_is_said_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    story = Story(tmp_path / "gone")
    measure(story, 1)
    assert len(warnings(caplog)) == 2
    assert story.step == 1
    story.close()


def test_metrics_are_one_line_each(tmp_path: Path) -> None:
    story = Story(tmp_path)
    measure(story, 1)
    measure(story, 2)
    story.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.5)]

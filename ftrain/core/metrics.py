"""What the run has logged, as far as commits go by it: each metric's newest value at the step of a commit.

A commit's record says it, so that it outlives every coordinator. A worker says what it logged before it says that a
snapshot is sealed; what it logged in the steps after that must not be taken for the snapshot's.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from ftrain.core import messages as m
from ftrain.core.journal import METRICS_MAX, History
from ftrain.core.run_state import Turn


def heard(turn: Turn, said: m.Metrics) -> None:
    """Rank 0 has logged something in a step of the present generation."""
    state = turn.state
    if state.generation is None or said.generation != state.generation.number:
        return
    values = {name: m.Logged(said.step, value) for name, value in said.values.items()}
    if state.barrier is None:
        turn.set(logged=_bounded({**state.logged, **state.logged_after, **values}), logged_after={})
    elif said.step < state.barrier.attempt.step:
        turn.set(logged=_bounded({**state.logged, **values}))
    else:
        turn.set(logged_after=_bounded({**state.logged_after, **values}))


def begin(turn: Turn) -> None:
    """A snapshot is proposed, of a step that no rank has come to: all that was logged is from before it."""
    state = turn.state
    turn.set(logged=_bounded({**state.logged, **state.logged_after}), logged_after={})


def go_back(turn: Turn, step: int, resume: m.Resume | None) -> None:
    """A generation goes on from `step`: what was logged in steps that are to be done again is void."""
    state = turn.state
    before = _of(state.history, resume)
    merged = {**state.logged, **state.logged_after}
    known = {name: one for name, one in merged.items() if one.step < step}
    turn.set(logged=_bounded({**before, **known}), logged_after={})


def of_newest(history: History) -> Mapping[str, m.Logged]:
    """What a coordinator that takes a run over knows."""
    return history.commits[-1][1].metrics if history.commits else {}


def _of(history: History, resume: m.Resume | None) -> Mapping[str, m.Logged]:
    if resume is None:
        return {}
    return next((commit.metrics for _, commit in history.commits if commit.attempt == resume.attempt), {})


def _bounded(values: dict[str, m.Logged]) -> dict[str, m.Logged]:
    """Of too many the names that came first stay."""
    return values if len(values) <= METRICS_MAX else dict(islice(values.items(), METRICS_MAX))

"""What `ftrain status` and Prometheus are told, drawn from the coordinator's state."""

from __future__ import annotations

from typing import Any

from ftrain.agent.story import Story
from ftrain.core.commit import Barrier
from ftrain.core.journal import History
from ftrain.core.page import Phase as WorkerPhase
from ftrain.core.run_state import State


def status(state: State, story: Story) -> dict[str, Any]:
    """A JSON-able picture of the run as the coordinator sees it now."""
    return {
        "run_id": state.policy.run_id,
        "phase": state.phase.value,
        "term": state.term,
        "generation": state.number,
        "step": state.furthest,
        "metrics": story.metrics,
        "nodes": [_node(state, name) for name in sorted(set(state.nodes) | set(state.members))],
        "attempts": [_attempt(barrier) for barrier in state.attempts_under_way],
        "commits": commits(state.history),
        "damaged": [attempt.path for attempt in sorted(state.suspects)],
        "interruptions": list(story.interruptions),
        "restarts": state.budget.restarts,
        "summary": state.summary,
    }


def _attempt(barrier: Barrier) -> dict[str, Any]:
    return {
        "step": barrier.attempt.step,
        "number": barrier.attempt.number,
        "persist": barrier.persist,
        "stage": barrier.stage.value,
        "waits_for_ranks": sorted(barrier.missing)[:64],
    }


def commits(history: History) -> list[dict[str, Any]]:
    """Those that are not retired, oldest first."""
    return [
        {"step": body.attempt.step, "path": body.attempt.path, "bytes": body.payload_bytes, "sequence": sequence}
        for sequence, body in history.commits
    ]


def _node(state: State, name: str) -> dict[str, Any]:
    node = state.nodes.get(name)
    member = state.generation.member(name) if state.generation is not None else None
    return {
        "node": name,
        "group_rank": member.group_rank if member is not None else None,
        "host": node.hello.host if node is not None else None,
        "pid": node.hello.pid if node is not None else None,
        "connected": node is not None and node.connected,
        "keeps": {
            str(kept.rank): {
                "boundaries": list(kept.boundaries),
                "snapshots": [attempt.step for attempt in kept.attempts],
            }
            for kept in state.report(name).keeps
        },
        "ranks": [
            {
                "rank": rank.rank,
                "local_rank": rank.local_rank,
                "pid": rank.pid,
                "step": rank.step,
                "phase": WorkerPhase(rank.phase).name.lower(),
                "joined": rank.joined,
                "stall_seconds": rank.stall_seconds,
                "still_seconds": rank.progress.still_seconds if rank.progress is not None else 0.0,
            }
            for rank in state.report(name).ranks
        ],
    }


def metrics_text(state: State, story: Story) -> str:
    """Prometheus text format, one family a line pair."""
    families = [
        ("ftrain_generation", "gauge", "The present generation.", float(state.number)),
        ("ftrain_step", "gauge", "Steps finished by the front rank.", float(max(state.furthest, 0))),
        (
            "ftrain_nodes_connected",
            "gauge",
            "Nodes with a channel.",
            float(sum(n.connected for n in state.nodes.values())),
        ),
        ("ftrain_restarts_total", "counter", "Generations started after a failure.", float(state.budget.restarts)),
        ("ftrain_commits_held", "gauge", "Commits that can be resumed from.", float(len(state.history.commits))),
        (
            "ftrain_last_recovery_seconds",
            "gauge",
            "Failure to back in the loop.",
            story.recovery_seconds,
        ),
    ]
    lines = [f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value:g}\n" for name, kind, text, value in families]
    return "".join(lines)

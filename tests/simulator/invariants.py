"""What must be true, kept apart from everybody's opinion: read off storage itself, and checked at every event.

Promise 1: a committed checkpoint that is not retired has, for good, its manifest and the packs of exactly the ranks of
its world, all of its own attempt. Promise 2: the journal is one chain, only its newest coordinator continues it, and
nobody obeys or announces anything else. And of going on in place: every rank of a generation begins at one step, with
state of that very step, whoever gave it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftrain.core import journal, node, run_state
from ftrain.core import messages as m
from ftrain.errors import CorruptCheckpoint, ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.simulator.agents import Agent
    from tests.simulator.coordinators import Coordinator
    from tests.simulator.workers import Worker
    from tests.simulator.world import World


ARMS_MAX, ANSWERS_MAX = 30, 100  # of a kind within a heartbeat: a node that was paused asks for many answers at once


class Violation(Exception):
    """A promise was broken."""


class Truth:
    def __init__(self, world: World) -> None:
        self.world = world
        self.history = journal.History()
        self.writer = ""  # of the newest term
        self.terms: dict[str, int] = {}  # writer -> term
        self.worlds: dict[int, int] = {}  # generation -> world size
        self.lines: dict[int, int] = {}  # generation -> the step that it went on from in place, -1 where it did not
        self.began: dict[int, int] = {}  # generation -> the step at which its first rank came into its loop
        self.told: set[tuple[int, int]] = set()  # (generation, pid) that have planned
        self.orders: dict[tuple[str, str, int], tuple[object, float, int]] = {}  # the last, since when, how often
        self.damaged: set[m.Attempt] = set()
        self.histories: dict[m.Attempt, int] = {}  # the generation in which the step of a snapshot was done
        self.commits = 0
        self.last_step = 0  # of the newest commit that is not damaged
        self.born: dict[tuple[int, int], int] = {}  # (generation, rank) -> pid
        self.attempts: set[m.Attempt] = set()
        self.acted_upon = 0  # the newest record that a coordinator took for durable

    # -------------------------------------------------------------------------------------------------- the journal

    def landed(self, path: str, data: bytes) -> None:
        """A record has become visible. Whoever reads the journal from now on sees it."""
        record = journal.decode(data, path)
        try:
            self.history = self.history.after(record, journal.digest(data))
        except CorruptCheckpoint as error:
            raise Violation(f"the journal is not one chain: {error}") from None
        writer = record.nonce.partition(":")[0]
        body = record.body
        if isinstance(body, journal.RunBody):
            self.writer = writer
            self.terms[writer] = record.sequence
        elif writer != self.writer:
            raise Violation(f"{writer} appended {type(body).__name__} though {self.writer} has taken over")
        if self.world.tracing:
            self.world.say("journal", body, f"{record.sequence:3d} by {writer}:")
        match body:
            case journal.GenerationBody():
                self._generation(body)
            case journal.CommitBody():
                self._commit(body)
            case journal.RetireBody(attempt):
                self._retire(attempt)

    def _generation(self, body: journal.GenerationBody) -> None:
        if body.generation in self.worlds:
            raise Violation(f"generation {body.generation} is in the journal twice")
        if self.worlds and body.generation <= max(self.worlds):
            raise Violation(f"generation {body.generation} follows {max(self.worlds)}")
        asked = [member.node_rank for member in body.members if member.node_rank >= 0]
        if len(asked) != len(set(asked)):
            raise Violation(f"generation {body.generation} has one node rank twice: {asked}")
        self.worlds[body.generation] = body.world_size
        self.lines[body.generation] = body.line_step
        if body.line_step >= 0:
            if body.line_step < self.last_step:
                raise Violation(
                    f"generation {body.generation} goes on from step {body.line_step}, not {self.last_step}"
                )
            return
        for _, commit in reversed(self.history.commits):
            if commit.attempt == body.resumes:
                return
            if commit.attempt not in self.damaged:
                raise Violation(f"generation {body.generation} starts from {body.resumes}, not from {commit.attempt}")
        if body.resumes is not None:
            raise Violation(f"generation {body.generation} starts from {body.resumes}, which is no commit")

    def _commit(self, body: journal.CommitBody) -> None:
        self.commits += 1
        attempt = body.attempt
        latest = max(self.worlds, default=0)
        since = [self.lines.get(number, -1) for number in range(attempt.generation + 1, latest + 1)]
        if any(step < attempt.step for step in since):
            raise Violation(f"{attempt} is committed in the time of generation {latest}, which does not go on from it")
        if body.world_size != self.worlds[latest]:
            raise Violation(f"{attempt}: committed for {body.world_size} ranks of {self.worlds[latest]}")
        resumed = self.history.generation.resumes if self.history.generation is not None else None
        if resumed is not None and attempt.step < resumed.step:
            raise Violation(f"{attempt} is committed by a generation that began at step {resumed.step}")
        if attempt.step < self.last_step:
            raise Violation(f"{attempt} is committed after step {self.last_step}")
        self.last_step = attempt.step
        if lost := set(body.refers) - self.history.needed:
            raise Violation(f"{attempt} refers to {min(lost)}, whose files nothing keeps")
        self._whole(body)

    def _retire(self, attempt: m.Attempt) -> None:
        # `history` has it left out already. Of a damage that no restore has met yet the coordinator cannot know.
        left = len(self.history.commits)
        if left < self.world.plan.policy.checkpoint.keep.last:
            raise Violation(f"{attempt} is retired: only {left} commits are left")

    def _whole(self, body: journal.CommitBody) -> None:
        """Exactly the packs of its world, each with its own content, and the manifest."""
        attempt = body.attempt
        if attempt in self.damaged:
            return
        storage = self.world.storage
        expected = (body.world_size, tuple(range(body.world_size)))
        manifest = storage.content(attempt, "manifest")
        if manifest != expected:
            raise Violation(f"{attempt} is committed, but its manifest is {manifest}")
        for rank in range(body.world_size):
            content = storage.content(attempt, f"packs/{rank}")
            if content != (attempt.generation, attempt.number, attempt.step, rank):
                raise Violation(f"{attempt} is committed, but the pack of rank {rank} is {content}")

    def deleted(self, attempt: m.Attempt) -> None:
        if self._committed(attempt):
            raise Violation(f"{attempt} is deleted though it is committed and not retired")
        if attempt in self.history.needed:
            raise Violation(f"{attempt} is deleted though a commit refers to it")

    def power_was_cut(self) -> None:
        """Read everything again: what was committed before must have stayed, unless its record was still in flight."""
        before = self.history
        after = journal.History()
        try:
            for path, data in self.world.storage.visible_records():
                after = after.after(journal.decode(data, path), journal.digest(data))
        except CorruptCheckpoint as error:
            raise Violation(f"after a power cut: {error}") from None
        self.history = after
        if after.head.sequence < before.head.sequence:
            self._forget(after)
        for _, body in after.commits:
            self._whole(body)

    def _forget(self, history: journal.History) -> None:
        """A record whose directory was not synced yet is gone. Nobody may have acted upon it."""
        if history.head.sequence < self.acted_upon:
            raise Violation(f"the power cut took back journal record {self.acted_upon}, which was acted upon")
        number = history.generation.generation if history.generation is not None else 0
        self.worlds = {key: size for key, size in self.worlds.items() if key <= number}
        self.lines = {key: step for key, step in self.lines.items() if key <= number}
        sound = [body.attempt.step for _, body in history.commits if body.attempt not in self.damaged]
        self.last_step = max(sound, default=0)
        self.terms = {writer: term for writer, term in self.terms.items() if term <= history.head.sequence}
        self.writer = max(self.terms, key=self.terms.__getitem__, default="")

    def _committed(self, attempt: m.Attempt) -> bool:
        return any(body.attempt == attempt for _, body in self.history.commits)

    def leftovers(self) -> tuple[m.Attempt, ...]:
        """The attempts that have files."""
        return tuple(sorted(attempt for attempt in self.attempts if attempt.path in self.world.storage.directories))

    # ---------------------------------------------------------------------------------------------------- coordinators

    def coordinator_stepped(
        self, who: Coordinator, before: run_state.State, after: run_state.State, actions: Iterable[run_state.Action]
    ) -> None:
        if after.history.head.sequence > before.history.head.sequence:
            self.acted_upon = max(self.acted_upon, after.history.head.sequence)
        fenced = False
        for action in actions:
            match action:
                case run_state.Send(_, message):
                    self._sent(who, message, fenced)
                case run_state.Discard(attempt):
                    if self._committed(attempt):
                        raise Violation(f"{who.name} discards {attempt}, which is committed and not retired")
                    if attempt in self.history.needed:
                        raise Violation(f"{who.name} discards {attempt}, to which a commit refers")
                case run_state.Publish(attempt):
                    self.attempts.add(attempt)
                case run_state.Exit(_, summary):
                    fenced = "another coordinator" in summary

    def _sent(self, who: Coordinator, message: m.FromCoordinator, fenced: bool) -> None:
        if fenced:
            raise Violation(f"{who.name} was fenced, and then says {message}")
        match message:
            case m.Committed(attempt=attempt):
                if not any(body.attempt == attempt for _, body in self.history.commits) and (
                    attempt not in {former.commit.attempt for former in self.history.retired}
                ):
                    raise Violation(f"{who.name} announces {attempt}, which the journal does not have")
            case m.Start(generation=generation):
                if generation not in self.worlds:
                    raise Violation(f"{who.name} starts generation {generation}, which the journal does not have")
            case m.Arm(attempt=attempt):
                self.attempts.add(attempt)

    # ----------------------------------------------------------------------------------------------------------- agents

    def agent_stepped(
        self, who: Agent, before: node.State, event: node.Event, actions: tuple[node.Action, ...]
    ) -> None:
        after = who.state
        if after.term < before.term:
            raise Violation(f"{who.name} went back from term {before.term} to {after.term}")
        if after.generation < before.generation:
            raise Violation(f"{who.name} went back from generation {before.generation} to {after.generation}")
        if isinstance(event, node.Said):
            term = getattr(event.message, "term", before.term)
            obeyed = [action for action in actions if not isinstance(action, node.Reconnect | node.Send)]
            if term < before.term and obeyed:
                raise Violation(f"{who.name} obeys term {term} though it has seen {before.term}: {obeyed}")

    def agent_left(self, who: Agent) -> None:
        alive = [worker.rank for worker in who.workers.values() if worker.alive]
        if alive:
            raise Violation(f"{who.name} ends though its ranks {alive} are alive")
        left = [worker.page.step for worker in who.workers.values()]
        newest = max((body.attempt.step for _, body in self.history.commits), default=0)
        assert who.exit is not None
        if who.exit.code == ExitCode.PREEMPTED and max(left, default=0) > newest:
            raise Violation(
                f"{who.name} says that step {max(left)} is saved, but the newest commit is of step {newest}"
            )

    def worker_born(self, worker: Worker) -> None:
        start = worker.start
        if start.generation not in self.worlds:
            raise Violation(f"rank {worker.rank} of generation {start.generation} is born before its record")
        if worker.rank >= self.worlds[start.generation]:
            raise Violation(f"rank {worker.rank} is born in a generation of {self.worlds[start.generation]}")
        if self.born.setdefault((start.generation, worker.rank), worker.pid) != worker.pid:
            raise Violation(f"rank {worker.rank} of generation {start.generation} is born twice")

    def restored(self, worker: Worker, resume: m.Resume) -> str:
        """The worker reads its checkpoint. Returns what is wrong with it."""
        attempt = resume.attempt
        current = worker.start.generation == max(self.worlds)
        storage = self.world.storage
        for rank in range(resume.world_size):
            content: Any = storage.content(attempt, f"packs/{rank}")
            if content == (attempt.generation, attempt.number, attempt.step, rank):
                continue
            if attempt not in self.damaged and current and (self._committed(attempt)):
                raise Violation(f"rank {worker.rank} restores {attempt}, whose pack {rank} is {content}")
            return f"{attempt}: rank {rank} is damaged"
        return ""

    def planned(self, worker: Worker) -> bool:
        """Whether this is the worker's first boundary in its generation."""
        key = (worker.generation, worker.pid)
        new = key not in self.told
        self.told.add(key)
        return new

    def sealed(self, worker: Worker, attempt: m.Attempt) -> None:
        if self.histories.setdefault(attempt, worker.history) != worker.history:
            raise Violation(f"{attempt} has ranks of histories {self.histories[attempt]} and {worker.history}")

    def history_of(self, worker: Worker, line: m.Line | None, resume: m.Resume | None) -> int:
        """The generation in which the step was done that the worker comes to."""
        if line is not None and line.tier is m.Tier.LIVE:
            giver = self._giver(worker, line)
            return giver.history
        attempt = line.attempt if line is not None and line.attempt is not None else resume and resume.attempt
        return self.histories.get(attempt, 0) if attempt is not None else 0

    def _giver(self, worker: Worker, line: m.Line) -> Worker:
        givers = [giver for giver, taker in line.copies if taker == worker.rank]
        if len(givers) > 1:
            raise Violation(f"rank {worker.rank} of generation {worker.generation} is given its state by {givers}")
        giver = worker.group.members.get(givers[0]) if givers else worker
        assert giver is not None, "a group that is whole has all its members"
        return giver

    def brought(self, worker: Worker, line: m.Line) -> str:
        """The worker comes to a line in memory. Returns what is wrong with it."""
        rank, who = worker.rank, f"rank {worker.rank} of generation {worker.generation}"
        if line.tier is m.Tier.ARENA:
            attempt = line.attempt
            assert attempt is not None
            content = (attempt.generation, attempt.number, attempt.step, rank)
            if content not in worker.memory.slots:
                raise Violation(f"{who} goes on from {attempt}, but its arena has {worker.memory.slots}")
            return ""
        giver = self._giver(worker, line)
        if giver.live != line.step:
            raise Violation(f"{who} goes on from step {line.step}, but rank {giver.rank} is at {giver.live}")
        if giver is not worker and not self.world.plan.replicated:
            raise Violation(f"{who} is given the shard of rank {giver.rank}")
        replays = rank in line.replay and self.world.plan.replays and line.step - 1 in worker.memory.box
        if line.step not in worker.memory.box and not replays:
            raise Violation(f"{who} goes on from step {line.step}, but its box has {worker.memory.box}")
        history = worker.memory.histories.get(line.step, giver.history)
        if rank not in line.replay and history != giver.history:
            raise Violation(f"{who} goes on with what is its own of history {history}, and all else of {giver.history}")
        return ""

    def loops(self, worker: Worker, step: int) -> None:
        began = self.began.setdefault(worker.generation, step)
        if began != step:
            raise Violation(f"rank {worker.rank} of generation {worker.generation} begins at {step}, others at {began}")

    def told_again(self, coordinator: Coordinator, name: str, message: m.FromCoordinator) -> None:
        """The same thing is said with each heartbeat, so that it is heard: not as often as both can talk."""
        if isinstance(message, m.Heard | m.Tell):
            return
        order: object = message
        most = ANSWERS_MAX
        if isinstance(message, m.Arm):  # another attempt for the same step is the same once more
            order, most = (message.attempt.generation, message.attempt.step), ARMS_MAX
        key = coordinator.name, name, most
        known, since, times = self.orders.get(key, (None, 0.0, 0))
        if known != order or self.world.now - since > self.world.plan.policy.heartbeat_seconds:
            since, times = self.world.now, 0
        if times > most:
            raise Violation(f"{name} is told the same {times} times within a heartbeat: {message}")
        self.orders[key] = order, since, times + 1

    def ended(self) -> None:
        """The run was recorded as finished well: its last state must be committed."""
        finish = self.history.finish
        plan = self.world.plan
        if finish is None or finish.exit_code != 0 or not plan.joins:
            return
        newest = max((body.attempt.step for _, body in self.history.commits), default=0)
        if plan.total_steps and newest != plan.total_steps:
            raise Violation(f"the run ended well, but its newest commit is of step {newest}")

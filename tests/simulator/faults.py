"""What strikes a schedule: each fault is one function of the world, which picks its victim by the world's dice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftrain.core import node

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulator.agents import Agent
    from tests.simulator.world import World


def strike(world: World, kind: str) -> None:
    if FAULTS[kind](world):
        world.count(kind)
        if world.tracing:
            world.say("fault", kind)


def _agent(world: World) -> Agent | None:
    alive = [agent for agent in world.agents if agent.alive]
    return world.pick(alive) if alive else None


def _kill_worker(world: World) -> bool:
    workers = [worker for agent in world.agents for worker in agent.workers.values() if worker.alive]
    if workers:
        world.pick(workers).end(0, world.pick((9, 11, 15)))
    return bool(workers)


def _worker_raises(world: World) -> bool:
    workers = [worker for agent in world.agents for worker in agent.workers.values() if worker.alive]
    if workers:
        world.pick(workers).raises("ValueError", f"bad luck number {world.events}")
    return bool(workers)


def _crash_agent(world: World) -> bool:
    agent = _agent(world)
    if agent is not None:
        agent.die()
    return agent is not None


def _crash_coordinator(world: World) -> bool:
    running = [coordinator for coordinator in world.coordinators if coordinator.running]
    if running:
        world.pick(running).die()
    return bool(running)


def _pause_coordinator(world: World) -> bool:
    running = [coordinator for coordinator in world.coordinators if coordinator.running]
    if not running:
        return False
    victim = world.pick(running)
    seconds = world.pick((1.0, 5.0, 15.0, 30.0))
    victim.paused_until = world.now + seconds
    world.after(seconds, victim.resume)
    if world.flip():
        for link in list(victim.links):
            link.close()
        world.after(world.uniform(0.0, 3.0), world.start_coordinator)
    return True


def _second_coordinator(world: World) -> bool:
    world.start_coordinator()
    return True


def _pause_agent(world: World) -> bool:
    agent = _agent(world)
    if agent is not None:
        seconds = world.pick((1.0, 5.0, 12.0))
        agent.paused_until = world.now + seconds
        world.after(seconds, agent.resume)
    return agent is not None


def _break_link(world: World) -> bool:
    links = [agent.link for agent in world.agents if agent.link is not None]
    if links:
        world.pick(links).close()
    return bool(links)


def _partition(world: World) -> bool:
    agent = _agent(world)
    if agent is not None:
        _cut(world, agent, (True, False))
    return agent is not None


def _one_way(world: World) -> bool:
    agent = _agent(world)
    if agent is not None:
        _cut(world, agent, (world.flip(),))
    return agent is not None


def _cut(world: World, agent: Agent, directions: tuple[bool, ...]) -> None:
    seconds = world.pick((1.0, 4.0, 10.0, 20.0))
    world.unreachable[agent.place] = world.now + seconds
    for up in directions:
        if agent.link is not None:
            agent.link.block(up, seconds)


def _storage_outage(world: World) -> bool:
    world.storage.out_until = world.now + world.pick((0.5, 3.0, 10.0))
    return True


def _power_cut(world: World) -> bool:
    world.storage.power_cut()
    return True


def _blackout(world: World) -> bool:
    for agent in [agent for agent in world.agents if agent.alive]:
        agent.die()
    for coordinator in [coordinator for coordinator in world.coordinators if coordinator.running]:
        coordinator.die()
    world.storage.power_cut()
    return True


def _damage(world: World) -> bool:
    truth = world.truth
    commits = [body for _, body in truth.history.commits if body.attempt not in truth.damaged]
    if len(commits) < 2:
        return False
    attempt = commits[-1].attempt
    truth.damaged.add(attempt)
    truth.last_step = commits[-2].attempt.step
    world.storage.replace(attempt, f"packs/{world.pick(range(commits[-1].world_size))}", "rotten")
    return True


def _sigterm_one(world: World) -> bool:
    agent = _agent(world)
    if agent is not None:
        agent.feed(node.Signalled("SIGTERM"))
    return agent is not None


def _sigterm_all(world: World) -> bool:
    for agent in [agent for agent in world.agents if agent.alive]:
        agent.feed(node.Signalled("SIGTERM"))
    return True


def _sigint(world: World) -> bool:
    for agent in [agent for agent in world.agents if agent.alive]:
        agent.feed(node.Signalled("SIGINT"))
    return True


FAULTS: dict[str, Callable[[World], bool]] = {
    "kill worker": _kill_worker,
    "worker raises": _worker_raises,
    "crash agent": _crash_agent,
    "crash coordinator": _crash_coordinator,
    "pause coordinator": _pause_coordinator,
    "second coordinator": _second_coordinator,
    "pause agent": _pause_agent,
    "break link": _break_link,
    "partition": _partition,
    "one-way partition": _one_way,
    "storage outage": _storage_outage,
    "power cut": _power_cut,
    "blackout": _blackout,
    "damage commit": _damage,
    "SIGTERM to one": _sigterm_one,
    "SIGTERM to all": _sigterm_all,
    "SIGINT": _sigint,
}

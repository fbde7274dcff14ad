"""Who is cut off, the node or the coordinator? Transcripts of a coordinator that does not hear everybody."""

from __future__ import annotations

from ftrain.core import messages as m
from ftrain.core.membership import FormationPolicy
from ftrain.core.run_state import Begin, Disconnected, Phase
from ftrain.core.supervision import FailureClass
from tests.core.scene import NODES, POLICY, Scene, successor
from tests.core.test_in_place import halted, in_loop, rank_of

LEASE_SECONDS = POLICY.lease_seconds
assert POLICY.formation == FormationPolicy(2, 2)


def running() -> Scene:
    scene = in_loop(Scene().started(), 8)
    scene.log.clear()
    return scene


def returns(scene: Scene, name: str, **more: object) -> list[str]:
    """A node that was forgotten connects again and says what it runs."""
    lines = scene.hello(name, m.Report(version=scene.versions[name], generation=1, stopped=False, **more))  # type: ignore[arg-type]
    return lines + scene.report(name, **more)


def at_work(scene: Scene, name: str, step: int) -> list[str]:
    return returns(scene, name, ranks=(rank_of(name, step),), looping=True, first_step=0)


def test_node_is_lost_at_once_when_its_lease_runs_out_while_another_is_heard() -> None:
    scene = running()
    scene.now += LEASE_SECONDS - 1.0
    scene.report("a", ranks=(rank_of("a", 9),), looping=True)
    assert "a <- Halt" in scene.wait(1.0)
    assert scene.state.gone == {"b"}


def test_coordinator_that_hears_nobody_waits_and_carries_on_with_what_comes_back() -> None:
    scene = running()
    scene.now += 0.7
    scene.report("a", ranks=(rank_of("a", 9),), looping=True)
    assert scene.wait(LEASE_SECONDS - 0.7) == []  # the lease of b is over, and a has been silent for long
    assert scene.state.gone == frozenset()
    scene.wait(0.7)
    assert scene.state.phase is Phase.ADOPTING
    assert scene.state.nodes == {}
    assert scene.wait(300.0) == []
    at_work(scene, "b", 900)
    assert scene.state.phase is Phase.ADOPTING
    at_work(scene, "a", 901)
    assert scene.state.phase is Phase.RUNNING
    assert scene.state.number == 1
    assert not any("append generation" in line or "interrupted" in line for line in scene.log)
    assert "generation 1 is still running on all nodes: carrying on with it" in scene.told


def test_node_that_is_heard_again_in_time_shows_that_the_other_is_cut_off() -> None:
    scene = running()
    scene.now += 4.0
    scene.report("a", ranks=(rank_of("a", 9),), looping=True)
    assert scene.wait(LEASE_SECONDS - 4.0) == []
    assert "a <- Halt" in scene.report("a", ranks=(rank_of("a", 9),), looping=True)
    assert scene.state.gone == {"b"}


def test_channels_that_broke_are_silent_too() -> None:
    scene = running()
    scene.now += 5.0
    for name in NODES:
        scene.do(Disconnected(name))
    scene.wait(LEASE_SECONDS - 5.0)
    assert scene.state.phase is Phase.ADOPTING


def test_of_nodes_that_come_back_one_alone_is_waited_for_no_longer_than_a_lease() -> None:
    scene = running()
    scene.wait(LEASE_SECONDS)
    scene.now += 100.0
    at_work(scene, "a", 50)
    assert scene.wait(LEASE_SECONDS - 1.0) == []
    assert "a <- Halt" in at_work(scene, "a", 51) + scene.wait(1.0)
    assert scene.state.gone == {"b"}


def test_attempt_numbers_are_never_used_twice() -> None:
    scene = running()
    scene.steps("a", 9)
    scene.steps("b", 9)
    before = scene.state.attempts
    for _ in range(2):
        scene.wait(LEASE_SECONDS)
        for name in NODES:
            at_work(scene, name, 10)
        assert scene.state.phase is Phase.RUNNING
        assert scene.state.attempts > before
        before = scene.state.attempts
        scene.wait(5.0)


def test_node_that_stood_still_by_itself_goes_on_in_place_with_the_others() -> None:
    scene = running()
    halted(scene, "b", 8)
    assert scene.state.failure is not None
    assert scene.state.failure.kind is FailureClass.LINK
    assert scene.state.failure.summary == "node 1 (b) was cut off"
    halted(scene, "a", 9)
    scene.stored()
    assert scene.say("a", m.StoreReady(2, "10.0.0.1", 29400)) == ["a <- Start 2", "b <- Start 2"]
    assert scene.state.survivors == {0, 1}


def test_cut_off_node_that_comes_back_while_it_is_waited_for_goes_on_in_place() -> None:
    scene = running()
    scene.now += LEASE_SECONDS - 1.0
    scene.report("a", ranks=(rank_of("a", 9),), looping=True)
    scene.wait(1.0)
    halted(scene, "a", 9)
    assert scene.state.phase is Phase.FORMING
    rank = rank_of("b", 9, halted=True, live=9, kept=(8, 9))
    lines = returns(scene, "b", ranks=(rank,), halted=True)
    assert "continues at 9 from live, 2 kept, 0 new" in lines
    assert not any("Stop" in line for line in lines)


def test_cut_off_node_that_comes_back_at_work_is_made_to_stand_still() -> None:
    scene = running()
    scene.now += LEASE_SECONDS - 1.0
    scene.report("a", ranks=(rank_of("a", 9),), looping=True)
    scene.wait(1.0)
    halted(scene, "a", 9)
    assert "b <- Halt" in at_work(scene, "b", 9)
    assert "continues at 9 from live, 2 kept, 0 new" in halted(scene, "b", 9)


def test_coordinator_that_took_a_run_over_waits_for_its_nodes_a_lease_and_no_longer() -> None:
    scene = successor(running())
    scene.do(Begin())
    scene.stored()
    assert scene.state.phase is Phase.ADOPTING
    scene.wait(LEASE_SECONDS)
    assert scene.state.phase is not Phase.ADOPTING

"""Snapshots of very many tensors: the training thread reads version counters, a thread looks where the tensors lie.

Between the two anything may happen to a tensor. Each test holds the look back, changes a tensor and lets it go on.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ftrain
from ftrain import _native
from ftrain.checkpoint.staging import stage
from ftrain.checkpoint.staging.arena import Arena, Image
from ftrain.checkpoint.staging.look import _anatomy, look, quick_look, recall, recalled_versions, versions
from ftrain.checkpoint.staging.stage import StagePlan, Stager, Staging
from ftrain.checkpoint.writing import job
from ftrain.checkpoint.writing.job import Jobs
from ftrain.core.layout import align
from ftrain.errors import MismatchedState
from tests.checkpoint.world import bits

pytestmark = pytest.mark.skipif(_anatomy() is None, reason="where this torch keeps its version counters is not known")

ELEMENTS = 1000


@pytest.fixture(autouse=True)
def three_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MANY", 3)
    monkeypatch.setattr(job, "MANY", 3)


@pytest.fixture
def image() -> Iterator[Image]:
    fd = _native.memory_file("test-stage")
    arena = Arena(fd)
    arena.reserve(1, 1 << 26, 0, 0)
    yield arena.image(0)
    arena.close()
    os.close(fd)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The look of a thread waits until this is set."""
    found, look_now = threading.Event(), stage.look

    def late_look(tensors: list[torch.Tensor], before: object = None, at_a_time: int = 0) -> object:
        if at_a_time:
            found.wait()
        return look_now(tensors, before, at_a_time)

    monkeypatch.setattr(stage, "look", late_look)
    return found


class Snapshots:
    """Three parameters, copied once already."""

    def __init__(self, image: Image, elements: int = ELEMENTS) -> None:
        self.tensors: list[torch.Tensor] = [torch.nn.Parameter(torch.randn(elements)) for _ in range(3)]
        self.plan = StagePlan(["a", "b", "c"], [place * align(4 * elements) for place in range(3)], [True] * 3)
        self.stager = Stager()
        self.image = image
        self.begin().finish()
        assert self.plan.may_be_looked_at_later

    def begin(self) -> Staging:
        return self.stager.begin(self.plan, self.tensors, self.image)

    def staged(self, place: int) -> bytes:
        begin = self.image.address - self.image.mapping.address + self.plan.offset(place)
        return bytes(self.image.mapping.view()[begin : begin + 4 * ELEMENTS])


def _in_place(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


def _through_a_view(tensor: torch.Tensor) -> None:
    tensor.detach()[5:].zero_()


def _by_foreach(tensor: torch.Tensor) -> None:
    torch._foreach_add_([tensor.detach()], 1.0)


def _by_index(tensor: torch.Tensor) -> None:
    tensor.detach()[3] = 7


def _by_out(tensor: torch.Tensor) -> None:
    torch.zeros(ELEMENTS, out=tensor.detach())


def _by_set(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.set_(torch.zeros(ELEMENTS))


def _by_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(ELEMENTS)


def _by_larger_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(2 * ELEMENTS)


def _by_swapping(tensor: torch.Tensor) -> None:
    torch.utils.swap_tensors(tensor, torch.nn.Parameter(torch.zeros(ELEMENTS)))


COUNTED = [_in_place, _through_a_view, _by_foreach, _by_index, _by_out]
MOVED = [_by_set, _by_data, _by_larger_data, _by_swapping]


@pytest.mark.parametrize("change", [*COUNTED, *MOVED])
def test_a_change_after_the_boundary_and_before_the_copy_voids_it(
    image: Image, gate: threading.Event, change: Callable[[torch.Tensor], None]
) -> None:
    snapshots = Snapshots(image)
    staging = snapshots.begin()
    assert staging.begun is not None
    assert not staging.begun.done()
    change(snapshots.tensors[1])
    gate.set()
    with pytest.raises(MismatchedState, match=r"^b (changed outside|got other memory)"):
        staging.finish()


@pytest.mark.parametrize("change", COUNTED)
def test_what_changed_so_is_copied_at_once_from_then_on(
    image: Image, gate: threading.Event, change: Callable[[torch.Tensor], None]
) -> None:
    snapshots = Snapshots(image)
    staging = snapshots.begin()
    change(snapshots.tensors[1])
    gate.set()
    with pytest.raises(MismatchedState):
        staging.finish()
    before = bits(snapshots.tensors[1])
    staging = snapshots.begin()
    change(snapshots.tensors[1])
    staging.finish()
    assert snapshots.staged(1) == before


def test_what_got_other_memory_is_looked_at_first_from_then_on(image: Image, gate: threading.Event) -> None:
    snapshots = Snapshots(image)
    staging = snapshots.begin()
    snapshots.tensors[1].data = torch.zeros(ELEMENTS)
    gate.set()
    with pytest.raises(MismatchedState):
        staging.finish()
    snapshots.tensors[1].data = torch.full((ELEMENTS,), 3.0)
    staging = snapshots.begin()
    assert staging.begun is None
    staging.finish()
    assert snapshots.staged(1) == bits(torch.full((ELEMENTS,), 3.0))


def test_what_got_other_memory_before_the_boundary_is_looked_at_there(image: Image, gate: threading.Event) -> None:
    snapshots = Snapshots(image)
    snapshots.tensors[1].data = torch.zeros(ELEMENTS)
    staging = snapshots.begin()
    assert staging.begun is None
    staging.finish()
    assert snapshots.staged(1) == bits(torch.zeros(ELEMENTS))
    assert not gate.is_set()


def test_an_optimizer_waits_for_the_look_and_the_copy(image: Image, gate: threading.Event) -> None:
    snapshots = Snapshots(image)
    before = [bits(tensor) for tensor in snapshots.tensors]
    optimizer = torch.optim.SGD(snapshots.tensors, lr=1.0)
    for tensor in snapshots.tensors:
        tensor.grad = torch.ones_like(tensor)
    staging = snapshots.begin()
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    while not staging._wait_began:
        assert stepping.is_alive()
    assert [bits(tensor) for tensor in snapshots.tensors] == before
    gate.set()
    stepping.join()
    staging.finish()
    assert [snapshots.staged(place) for place in range(3)] == before
    assert [bits(tensor) for tensor in snapshots.tensors] != before


def _comparing(staging: Staging) -> threading.Event:
    """Set once a thread beside the training has compared the versions, or has given that up."""
    done, settle = threading.Event(), staging.settle_beside

    def settle_and_tell() -> None:
        settle()
        done.set()

    staging.settle_beside = settle_and_tell  # type: ignore[method-assign]
    return done


def test_a_change_that_counts_only_when_it_is_done_voids_the_snapshot(image: Image, gate: threading.Event) -> None:
    """The copy takes place while an operation that counts its change at its end goes on in the main thread."""
    snapshots = Snapshots(image, elements=1 << 22)
    changed = snapshots.tensors[2].detach().fill_(2.0)
    staging = snapshots.begin()
    before, counted = changed._version, []

    def copy_in_the_middle_of_it() -> None:
        while changed[0].item() == 2.0:
            pass
        gate.set()
        staging.finish(for_now=True)  # what there is to see as yet
        counted.append(changed._version)

    copying = threading.Thread(target=copy_in_the_middle_of_it)
    copying.start()
    changed.polygamma_(3)  # some 100 ns an element
    copying.join()
    assert counted == [before], "the operation was over before the copy: this shows nothing"
    with pytest.raises(MismatchedState, match=r"^c changed outside"):
        staging.settle()


def test_versions_are_compared_beside_the_training_before_an_optimizer_comes(
    image: Image, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared_by: list[threading.Thread] = []

    def noted(tensors: list[torch.Tensor], before: object = None, at_a_time: int = 0) -> bytes:
        compared_by.append(threading.current_thread())
        return versions(tensors, before, at_a_time)  # type: ignore[arg-type]

    snapshots = Snapshots(image)
    monkeypatch.setattr(stage, "versions", noted)
    staging = snapshots.begin()
    done = _comparing(staging)
    gate.set()
    while not done.is_set():
        pass
    staging.before_write()
    _in_place(snapshots.tensors[2])
    staging.finish()
    assert [thread.name[:11] for thread in compared_by] == ["ftrain-look"]


def test_an_optimizer_that_comes_while_the_main_thread_is_waited_for_compares_itself(
    image: Image, gate: threading.Event
) -> None:
    """The training thread is in native code from the boundary to the optimizer."""
    snapshots = Snapshots(image)
    staging = snapshots.begin()
    done = _comparing(staging)
    lock, came = threading.Lock(), []

    def step() -> None:
        _in_place(snapshots.tensors[1])
        gate.set()
        staging.before_write()
        came.append(done.wait(60))
        lock.release()

    lock.acquire()
    threading.Thread(target=step).start()
    lock.acquire()  # native code, from which nothing but that thread gets us
    assert came == [True]
    with pytest.raises(MismatchedState, match=r"^b changed outside"):
        staging.finish()


def test_snapshot_of_another_thread_than_the_main_one_is_compared_by_that_thread(
    image: Image, gate: threading.Event
) -> None:
    snapshots = Snapshots(image)
    begun: list[Staging] = []
    other = threading.Thread(target=lambda: begun.append(snapshots.begin()))
    other.start()
    other.join()
    gate.set()
    staging = begun[0]
    staging.finish(for_now=True)
    _in_place(snapshots.tensors[2])
    with pytest.raises(MismatchedState, match=r"^c changed outside"):
        staging.settle()


def test_a_change_after_an_optimizer_was_let_in_is_none_of_the_snapshot(image: Image) -> None:
    snapshots = Snapshots(image)
    staging = snapshots.begin()
    staging.finish(for_now=True)
    staging.before_write()
    _in_place(snapshots.tensors[2])
    staging.settle()


def test_a_state_that_is_as_before_is_recalled_with_its_versions() -> None:
    state = {f"t{number}": torch.zeros(number) for number in range(4)}
    tensors = list(state.values())
    seen = quick_look(tensors)
    assert seen is not None
    state["t2"].add_(1)
    assert recall(seen, [state], list(state)) == (tensors, versions(tensors))
    assert recalled_versions(tensors, seen) == versions(tensors)
    halves = [dict(list(state.items())[:1]), dict(list(state.items())[1:])]
    assert recall(seen, halves, list(state)) == (tensors, versions(tensors))


OTHER: list[Callable[[dict[str, object]], object]] = [
    lambda state: state.update(t1=torch.zeros(1)),
    lambda state: state.update(t9=state.pop("t3")),
    lambda state: state.update(t9=torch.zeros(1)),
    lambda state: state.update(t0="no tensor"),
    lambda state: state.pop("t3"),
    lambda state: state.update(t0=state.pop("t0")),
    lambda state: setattr(state["t2"], "data", torch.zeros(2)),
]


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("change", OTHER)
def test_a_state_that_is_not_as_before_is_not_recalled(
    change: Callable[[dict[str, object]], object], is_known: bool
) -> None:
    state: dict[str, object] = {f"t{number}": torch.zeros(number) for number in range(4)}
    tensors = list(state.values())
    seen = look(tensors)  # type: ignore[arg-type]
    keys = list(state)
    assert isinstance(seen, _native.Look)
    if is_known:
        assert recall(seen, [state], keys) is not None
    change(state)
    assert recall(seen, [state], keys) is None


def test_a_dict_that_changed_and_holds_the_same_again_is_gone_through_and_recalled() -> None:
    state = {f"t{number}": torch.zeros(number) for number in range(4)}
    tensors, keys = list(state.values()), list(state)
    seen = quick_look(tensors)
    assert seen is not None
    assert recall(seen, [state], keys) is not None
    last = state.pop(keys[3])
    assert recall(seen, [state], keys) is None
    state[keys[3]] = last
    assert recall(seen, [state], keys) == (tensors, versions(tensors))
    assert recall(seen, [dict(state)], keys) == (tensors, versions(tensors))
    assert recall(seen, [state], ["t0", "t1", "t2", "t4"]) is None


@pytest.mark.parametrize("is_twice", [False, True])
def test_recalls_hold_each_tensor_once_more(is_twice: bool) -> None:
    state = {f"t{number}": torch.zeros(1) for number in range(5000)}
    if is_twice:
        state["t4999"] = state["t0"]
    tensors, keys = list(state.values()), list(state)
    seen = quick_look(tensors)
    assert seen is not None
    counts = list(map(sys.getrefcount, tensors))
    for _ in range(3):
        state["t7"].add_(1)
        found = recall(seen, [state], keys)
        assert found is not None
        assert found == (tensors, versions(tensors))
        more = [now - count for now, count in zip(map(sys.getrefcount, tensors), counts, strict=True)]
        assert more == [2 if tensor is tensors[-1] and is_twice else 1 for tensor in tensors]
        del found
        assert list(map(sys.getrefcount, tensors)) == counts
    state["t4000"].data = torch.zeros(1)
    assert recall(seen, [state], keys) is None
    assert list(map(sys.getrefcount, tensors)) == counts


def test_a_recalled_job_is_the_job_of_the_same_state() -> None:
    jobs = Jobs()
    state: dict[str, object] = {"x": {f"t{number}": torch.zeros(number) for number in range(4)}}
    first = jobs.job(state)
    again = jobs.job(state)
    assert again.versions is not None
    assert (again.specs, again.late, again.plain) == (first.specs, first.late, first.plain)
    assert all(a is b for a, b in zip(again.tensors, first.tensors, strict=True))
    jobs.forget()
    assert jobs.job(state).versions is None


def test_a_save_of_what_changed_under_it_fails_and_the_next_holds_the_new_state(
    tmp_path: Path, gate: threading.Event
) -> None:
    state = {f"t{number}": torch.full((ELEMENTS,), float(number)) for number in range(4)}
    gate.set()
    ftrain.async_save(tmp_path / "first", state).result()
    ftrain.async_save(tmp_path / "second", state).result()
    gate.clear()
    saving = ftrain.async_save(tmp_path / "third", state)
    state["t1"].data = torch.zeros(2)  # another shape, too
    gate.set()
    with pytest.raises(MismatchedState, match=r"^t1 got other memory"):
        saving.result()
    assert not (tmp_path / "third" / "manifest.json").exists()
    ftrain.async_save(tmp_path / "fourth", state).result()
    loaded = {key: torch.empty_like(tensor) for key, tensor in state.items()}
    ftrain.load(tmp_path / "fourth", loaded)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())

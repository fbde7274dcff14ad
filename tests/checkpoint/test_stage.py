"""Copies that overlap what follows: what is captured, who waits, and what shows that a tensor changed underneath."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain import _native
from ftrain.checkpoint.staging import stage
from ftrain.checkpoint.staging.arena import Arena, Image
from ftrain.checkpoint.staging.stage import StagePlan, Stager
from ftrain.core.layout import align
from ftrain.errors import MismatchedState
from tests.checkpoint.world import bits

ROOM = 8 << 20


@pytest.fixture
def image() -> Iterator[Image]:
    fd = _native.memory_file("test-stage")
    arena = Arena(fd)
    arena.reserve(1, ROOM, 0, 0)
    yield arena.image(0)
    arena.close()
    os.close(fd)


def plan_of(tensors: list[torch.Tensor], late: bool = True) -> StagePlan:
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += align(tensor.nbytes)
    assert end <= ROOM
    return StagePlan([f"t{number}" for number in range(len(tensors))], offsets, [late] * len(tensors))


def staged(image: Image, plan: StagePlan, number: int, tensor: torch.Tensor) -> bytes:
    begin = image.address - image.mapping.address + plan.offset(number)
    return bytes(image.mapping.view()[begin : begin + tensor.nbytes])


class HeldBack:
    """Lets no late copy begin before it is told to: the threads of a real Copier are held at a gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        copier = _native.Copier(1)
        gate = self.gate

        class Job:
            def __init__(self, plan: _native.CopyPlan, base: int) -> None:
                self._begin: Callable[[], _native.CopyJob] = lambda: copier.begin(plan, base)
                self._lock = threading.Lock()
                self._job: _native.CopyJob | None = None

            def wait(self) -> None:
                gate.wait()
                with self._lock:
                    if self._job is None:
                        self._job = self._begin()
                self._job.wait()

        class Copier:
            def __init__(self, threads: int) -> None:
                assert threads

            def begin(self, plan: _native.CopyPlan, base: int) -> Job:
                return Job(plan, base)

        monkeypatch.setattr(stage._native, "Copier", Copier)


def test_what_an_optimizer_changes_next_is_captured_as_it_was(image: Image) -> None:
    parameters = [torch.nn.Parameter(torch.randn(300_000)) for _ in range(4)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    plan, stager = plan_of(list(parameters)), Stager()
    for _ in range(5):
        before = [bits(parameter) for parameter in parameters]
        staging = stager.begin(plan, parameters, image)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        staging.finish()
        assert [staged(image, plan, number, one) for number, one in enumerate(parameters)] == before
        assert [bits(parameter) for parameter in parameters] != before


def test_an_optimizer_waits_for_copies_that_are_late(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldBack(monkeypatch)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    plan = plan_of([parameter])
    staging = Stager().begin(plan, [parameter], image)
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    while not staging._wait_began:
        assert stepping.is_alive()
    assert not parameter.detach().any()
    held.gate.set()
    stepping.join()
    staging.finish()
    assert not any(staged(image, plan, 0, parameter))
    assert bool((parameter == -1).all())
    assert staging.stall_seconds > staging.boundary_seconds


def test_a_tensor_that_changed_under_its_copy_voids_it_and_is_copied_at_once_next_time(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldBack(monkeypatch)
    tensors = [torch.zeros(1000), torch.zeros(1000)]
    plan, stager = plan_of(tensors), Stager()
    staging = stager.begin(plan, tensors, image)
    tensors[1].add_(1)
    held.gate.set()
    with pytest.raises(MismatchedState, match=r"^t1 changed outside of an optimizer's step"):
        staging.finish()
    staging = stager.begin(plan, tensors, image)
    tensors[1].add_(1)
    staging.finish()
    assert staged(image, plan, 1, tensors[1]) == bits(torch.ones(1000))


def test_what_is_not_late_is_captured_before_begin_returns(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    HeldBack(monkeypatch).gate.set()
    buffer = torch.ones(1000)
    plan = plan_of([buffer], late=False)
    staging = Stager().begin(plan, [buffer], image)
    buffer.zero_()
    staging.finish()
    assert staged(image, plan, 0, buffer) == bits(torch.ones(1000))


def test_what_was_made_in_inference_mode_is_captured_at_once(image: Image) -> None:
    with torch.inference_mode():
        tensor = torch.ones(1000)
    plan = plan_of([tensor])
    staging = Stager().begin(plan, [tensor], image)
    with torch.inference_mode():
        tensor.zero_()
    staging.finish()
    assert staged(image, plan, 0, tensor) == bits(torch.ones(1000))


ODD = {
    "transposed": torch.arange(12).reshape(3, 4).t(),
    "strided": torch.arange(40)[::3],
    "expanded": torch.arange(3).expand(5, 3),
    "conjugated": torch.randn(8, dtype=torch.complex64).conj(),
    "negative": torch.randn(8, dtype=torch.complex128).conj().imag,
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "bool": torch.tensor([True, False, True]),
    "bfloat16": torch.randn(33).bfloat16(),
    "float8": torch.randn(33).to(torch.float8_e4m3fn),
    "complex": torch.randn(5, dtype=torch.complex128),
    "view": torch.arange(100, dtype=torch.float64)[7:20],
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_any_form_arrive_as_their_elements_in_c_order(image: Image, kind: str) -> None:
    tensor = ODD[kind]
    plan = plan_of([tensor, torch.ones(3), tensor])
    tensors = [tensor, torch.ones(3), tensor]
    Stager().begin(plan, tensors, image).finish()
    wanted = bits(tensor.resolve_conj().resolve_neg().contiguous())
    assert staged(image, plan, 0, tensor) == wanted
    assert staged(image, plan, 2, tensor) == wanted


def test_a_tensor_whose_memory_moved_is_found_again(image: Image) -> None:
    tensor = torch.nn.Parameter(torch.zeros(1000))
    plan, stager = plan_of([tensor]), Stager()
    stager.begin(plan, [tensor], image).finish()
    tensor.data = torch.ones(2, 1000)[1]
    gc.collect()
    stager.begin(plan, [tensor], image).finish()
    assert staged(image, plan, 0, tensor) == bits(torch.ones(1000))
    tensor.data = torch.arange(2000.0)[::2]
    stager.begin(plan, [tensor], image).finish()
    assert staged(image, plan, 0, tensor) == bits(torch.arange(0.0, 2000.0, 2.0))


def test_a_tensor_reshaped_in_place_voids_the_snapshot(image: Image) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    plan, stager = plan_of([tensor]), Stager()
    stager.begin(plan, [tensor], image).finish()
    tensor.t_()
    with pytest.raises(MismatchedState, match=r"t0 had the shape \[3, 4\] and has \[4, 3\]"):
        stager.begin(plan, [tensor], image).finish()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 70_000), min_size=1, max_size=20), late=st.booleans())
def test_tensors_of_any_size_arrive(sizes: list[int], late: bool) -> None:
    fd = _native.memory_file("test-stage")
    arena = Arena(fd)
    arena.reserve(1, ROOM, 0, 0)
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    plan = plan_of(tensors, late)
    Stager().begin(plan, tensors, arena.image(0)).finish()
    assert [staged(arena.image(0), plan, number, one) for number, one in enumerate(tensors)] == list(map(bits, tensors))
    arena.close()
    os.close(fd)


def test_a_forked_child_copies_with_threads_of_its_own(image: Image) -> None:
    tensor = torch.arange(1000.0)
    plan, stager = plan_of([tensor]), Stager()
    stager.begin(plan, [tensor], image).finish()
    child = os.fork()
    if child == 0:
        tensor.add_(1)
        stager.begin(plan, [tensor], image).finish()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert staged(image, plan, 0, tensor) == bits(torch.arange(1.0, 1001.0))

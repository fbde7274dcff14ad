"""Copies between device and host: the right bytes, however late and in whatever order the device works."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from ftrain import _native
from tests.native.standin.copies import Image
from tests.native.standin.gpu import OUT_OF_MEMORY, Gpu, without

SEEDS = range(8)
BATCHES = ["cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"]

# How small copies are made, with what the driver must lack for it, and whether there is a compiler.
WAYS: dict[str, tuple[list[str], bool]] = {
    "kernel": ([], True),
    "batch": ([], False),
    "old-batch": (["cuMemcpyBatchAsync_v2"], False),
    "single": (BATCHES, False),
}


def make_stager(gpu: Gpu, *, kernels: bool = True) -> _native.CudaStager:
    return _native.CudaStager(0, [gpu.path] if kernels else [])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    missing, kernels = WAYS[request.param]
    if missing:
        driver = without(driver, driver.with_suffix(".old"), missing)
        monkeypatch.setenv("FTRAIN_LIBCUDA", str(driver))
    gpu = Gpu(driver)
    gpu.start()
    yield Way(gpu, request.param.removeprefix("old-"), kernels)
    gpu.finish()


@dataclass(frozen=True)
class Way:
    gpu: Gpu
    how: str
    kernels: bool

    def stager(self) -> _native.CudaStager:
        stager = make_stager(self.gpu, kernels=self.kernels)
        assert stager.small_copies()[0] == self.how
        return stager


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
def test_copies_of_all_sizes_and_alignments_give_the_tensors_bytes(way: Way, seed: int, pinned: bool) -> None:
    stager, gpu = way.stager(), way.gpu
    image, compute = Image(gpu, seed), gpu.stream()
    with ExitStack() as stack:
        if pinned:
            pin = stager.pin(image.address, image.nbytes)
            stack.callback(pin.close)
            assert pin.pinned and pin.reason == ""
        content = image.compute(compute, seed)
        ticket = stager.begin(image.copies, compute)
        ticket.wait()
        assert image.host() == image.host_after(content)
        assert ticket.done()


@pytest.mark.parametrize("seed", SEEDS)
def test_writes_after_order_do_not_reach_the_copies(way: Way, seed: int) -> None:
    stager, gpu = way.stager(), way.gpu
    image, compute = Image(gpu, seed), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    before = image.compute(compute, seed)
    ticket = stager.begin(image.copies, compute)
    ticket.order(compute)
    after = image.compute(compute, seed + 1)
    gpu.drain()
    assert image.host() == image.host_after(before)
    assert image.device() == after
    ticket.wait()
    pin.close()


def test_writes_without_order_reach_the_copies_under_some_seed(gpu: Gpu) -> None:
    """The stand-in is worth its name: what `order` prevents does happen without it."""
    torn = 0
    for seed in SEEDS:
        stager = make_stager(gpu)
        image, compute = Image(gpu, seed), gpu.stream()
        pin = stager.pin(image.address, image.nbytes)
        before = image.compute(compute, seed)
        ticket = stager.begin(image.copies, compute)
        image.compute(compute, seed + 1)
        gpu.drain()
        torn += image.host() != image.host_after(before)
        del ticket
        pin.close()
    assert torn > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_upload_fills_the_tensors_before_later_work_reads_them(way: Way, seed: int) -> None:
    stager, gpu = way.stager(), way.gpu
    image, compute = Image(gpu, seed), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    content = image.compute(compute, seed)  # a write before it, which must not come after
    ticket = stager.upload(image.copies, compute)
    seen = gpu.allocate(image.device_nbytes)
    gpu.move(compute, seen, image.device_address, image.device_nbytes)  # what the next layer reads
    gpu.drain()
    assert image.device() == image.device_after(content)
    assert gpu.peek(seen, image.device_nbytes) == image.device_after(content)
    ticket.wait()
    pin.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_plan_begun_many_times_copies_what_is_there_each_time(gpu: Gpu, seed: int) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    plan = stager.plan(image.copies)
    assert plan.nbytes == sum(nbytes for _, _, nbytes in image.copies)
    for step in range(5):
        content = image.compute(compute, seed + step)
        ticket = plan.begin(compute)
        ticket.order(compute)
        image.compute(compute, seed - step)
        ticket.wait()
        assert image.host() == image.host_after(content)
    pin.close()


def test_plan_in_the_steady_state_makes_nothing_in_the_driver(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=3), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    plan = stager.plan(image.copies)

    def step() -> None:
        ticket = plan.begin(compute)
        ticket.order(compute)
        ticket.wait()

    step()
    before = dict(gpu.counts())
    step()
    used = {name for name, count in gpu.counts().items() if count > before.get(name, 0)}
    assert used == {
        "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuEventRecord", "cuStreamWaitEvent", "cuEventSynchronize",
        "cuLaunchKernel", "cuMemcpyDtoHAsync_v2",
    }  # fmt: skip
    pin.close()


def test_small_copies_take_one_launch_and_large_ones_one_call_each(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=5, count=200), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    plan = stager.plan(image.copies)
    launches, copies = gpu.count("cuLaunchKernel"), gpu.count("cuMemcpyDtoHAsync_v2")
    plan.begin(compute).wait()
    assert gpu.count("cuLaunchKernel") - launches == 1
    large = sum(nbytes >= 256 << 10 for _, _, nbytes in image.copies)
    assert gpu.count("cuMemcpyDtoHAsync_v2") - copies == large
    pin.close()


def test_large_tensor_goes_in_pieces(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    nbytes = (64 << 20) + 12_345
    image, compute = Image(gpu, seed=1, count=1, sizes=[nbytes]), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    content = image.compute(compute, 1)
    stager.begin(image.copies, compute).wait()
    assert image.host() == image.host_after(content)
    assert gpu.count("cuMemcpyDtoHAsync_v2") == 2
    pin.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_ticket_dropped_in_flight_waits_for_its_copies(gpu: Gpu, seed: int) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    content = image.compute(compute, seed)
    stager.begin(image.copies, compute)
    assert image.host() == image.host_after(content)
    pin.close()


def test_plans_dropped_before_they_are_begun_wait_for_their_tables(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=1), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    plans = [stager.plan(image.copies) for _ in range(20)]  # more than there is memory kept for
    plans.clear()
    content = image.compute(compute, 1)
    stager.begin(image.copies, compute).wait()
    assert image.host() == image.host_after(content)
    pin.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_pin_closed_in_flight_waits_for_the_copies(gpu: Gpu, seed: int) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    content = image.compute(compute, seed)
    ticket = stager.begin(image.copies, compute)
    pin.close()
    assert image.host() == image.host_after(content)
    assert not pin.pinned
    ticket.wait()


def test_ticket_outlives_its_stager_plan_and_pin(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=7), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    plan = stager.plan(image.copies)
    content = image.compute(compute, 7)
    ticket = plan.begin(compute)
    del stager, plan, pin
    gc.collect()
    ticket.wait()
    assert image.host() == image.host_after(content)


def test_plan_after_its_pin_was_closed_is_refused(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=2), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    plan = stager.plan(image.copies)
    pin.close()
    with pytest.raises(ValueError, match="given back"):
        plan.begin(compute)


def test_wait_leaves_other_threads_running(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=2), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    with gpu.gate(compute):
        content = image.compute(compute, 2)
        ticket = stager.begin(image.copies, compute)
        assert not ticket.done()
        waiting = threading.Thread(target=ticket.wait)
        waiting.start()
        assert image.host() != image.host_after(content)
    waiting.join()  # the gate was opened by this thread while the other waited
    assert image.host() == image.host_after(content)
    pin.close()


def test_what_is_kept_goes_when_the_copies_are_done(gpu: Gpu) -> None:
    class Tensor:
        pass

    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=2), gpu.stream()
    finish: list[Callable[[_native.CudaTicket], object]] = [
        lambda ticket: ticket.wait(),
        lambda ticket: [None for _ in iter(ticket.done, True)],
    ]
    for end in finish:
        tensor = Tensor()
        seen = weakref.ref(tensor)
        ticket = stager.begin(image.copies, compute, keep=[tensor])
        del tensor
        assert seen() is not None
        end(ticket)
        assert seen() is None


def test_copies_are_ordered_by_events_alone(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    assert gpu.blocking_streams() == 0
    image = Image(gpu, seed=2)
    stager.begin(image.copies, 0).wait()  # and stream 0 is one to be ordered after, too


def test_memory_that_cannot_be_pinned_says_why_and_is_copied_all_the_same(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=4), gpu.stream()
    gpu.fail("cuMemHostRegister_v2", 1, OUT_OF_MEMORY)
    pin = stager.pin(image.address, image.nbytes)
    assert not pin.pinned
    assert "CUDA_ERROR_OUT_OF_MEMORY" in pin.reason and "ulimit -l" in pin.reason
    content = image.compute(compute, 4)
    stager.begin(image.copies, compute).wait()
    assert image.host() == image.host_after(content)
    pin.close()


def test_memory_that_somebody_else_pinned_is_used_and_left_to_them(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed=4), gpu.stream()
    gpu.register(image.address, image.nbytes)
    pin = stager.pin(image.address, image.nbytes)
    assert pin.pinned
    content = image.compute(compute, 4)
    stager.begin(image.copies, compute).wait()
    assert image.host() == image.host_after(content)
    pin.close()
    gpu.unregister(image.address)


@pytest.mark.parametrize("part", ["begin", "end"])
def test_memory_of_which_somebody_else_pinned_a_part_is_refused(gpu: Gpu, part: str) -> None:
    stager = make_stager(gpu)
    image = Image(gpu, seed=4)
    place = image.address if part == "begin" else image.address + image.nbytes - 64
    gpu.register(place, 64)
    with pytest.raises(_native.CudaFailure, match="pinned before by somebody else"):
        stager.pin(image.address, image.nbytes)
    gpu.unregister(place)
    pin = stager.pin(image.address, image.nbytes)
    assert pin.pinned
    pin.close()


def test_memory_pinned_for_two_devices_stays_so_until_the_last_gives_it_back(gpu: Gpu) -> None:
    image = Image(gpu, seed=4)
    stagers = [_native.CudaStager(device, [gpu.path]) for device in (0, 1)]
    pins = [stager.pin(image.address, image.nbytes) for stager in stagers]
    assert [stager.device for stager in stagers] == [0, 1]
    assert gpu.living()["registered"] == 1
    pins[0].close()
    pins[0].close()
    assert gpu.living()["registered"] == 1 and pins[1].pinned
    pins[1].close()
    assert "registered" not in gpu.living()


def test_null_addresses_and_ranges_of_nothing_are_refused(gpu: Gpu) -> None:
    stager = make_stager(gpu)
    for copy in [(0, 1 << 61, 8), (1 << 20, 0, 8)]:
        with pytest.raises(ValueError, match="null"):
            stager.plan([copy])
    with pytest.raises(ValueError, match="null"):
        stager.pin(0, 8)
    with pytest.raises(ValueError, match="null"):
        stager.digest([(0, 8)], 0)
    with pytest.raises(ValueError, match="null"):
        _native.digest_address(0, 8)
    empty = stager.begin([(0, 0, 0)], 0)
    empty.wait()


@pytest.mark.parametrize("seed", SEEDS)
def test_digest_of_device_memory_is_that_of_the_same_bytes_on_the_host(gpu: Gpu, seed: int) -> None:
    stager = make_stager(gpu)
    image, compute = Image(gpu, seed, sizes=[0, 1, 7, 8, 9, 64, 100_003, 500_000]), gpu.stream()
    content = image.compute(compute, seed)
    buffer = ctypes.create_string_buffer(content, len(content))
    start = ctypes.addressof(buffer)
    ranges = [(device, nbytes) for _, device, nbytes in image.copies]
    expected = [_native.digest_address(start + (device - image.device_address), nbytes) for device, nbytes in ranges]
    assert stager.digest(ranges, compute) == expected
    assert stager.digest([], compute) == []
    assert len({digest for digest, (_, nbytes) in zip(expected, ranges, strict=True) if nbytes > 8}) > 1


def test_digest_without_a_compiler_says_what_is_missing(gpu: Gpu) -> None:
    stager = make_stager(gpu, kernels=False)
    with pytest.raises(_native.CudaFailure, match="needs kernels: there is no NVRTC"):
        stager.digest([(gpu.allocate(8), 8)], 0)

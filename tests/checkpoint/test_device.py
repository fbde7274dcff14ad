"""DeviceCopies over the stand-in driver, with stand-ins for CUDA tensors; and over a real GPU where there is one."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ftrain import _native
from ftrain.checkpoint.staging import device
from ftrain.checkpoint.staging.arena import Image
from ftrain.checkpoint.staging.device import PLANS_MAX, DeviceCopies, begin_upload
from ftrain.checkpoint.staging.stage import Stager
from tests.native.standin.gpu import OUT_OF_MEMORY, Gpu, library

SEEDS = range(6)
CUDA = torch.device("cuda", 0)


class StandInTensor:
    """What DeviceCopies asks of a CUDA tensor, on the stand-in. Work comes to one stream, and when the tensor goes,
    another's bytes come to its memory, in the order of that stream: what torch's allocator allows.

    A strided one has its elements elsewhere in another order; here, that is the same bytes, reversed.
    """

    def __init__(self, world: World, nbytes: int, *, strided: bool = False, on: torch.device = CUDA) -> None:
        self.world, self.nbytes, self.strided, self.device = world, nbytes, strided, on
        self.dtype, self.shape = torch.uint8, torch.Size([nbytes])
        self.address = world.gpu.allocate(max(nbytes, 1))
        weakref.finalize(self, world.gpu.write, world.stream, self.address, b"\xee" * nbytes)

    def compute(self, content: bytes) -> None:
        """Its elements become these, on the stream."""
        self.content = content
        self.world.gpu.write(self.world.stream, self.address, content[::-1] if self.strided else content)

    def elements(self) -> bytes:
        memory = self.world.gpu.peek(self.address, self.nbytes)
        return memory[::-1] if self.strided else memory

    def detach(self) -> StandInTensor:
        return self

    resolve_conj = resolve_neg = detach

    def numel(self) -> int:
        return self.nbytes

    def is_contiguous(self) -> bool:
        return not self.strided

    def is_conj(self) -> bool:
        return False

    is_neg = is_conj

    def data_ptr(self) -> int:
        return self.address

    def contiguous(self) -> StandInTensor:
        plain = self.new_empty(self.shape)
        plain.compute(self.content)
        return plain

    def new_empty(self, shape: torch.Size) -> StandInTensor:
        return StandInTensor(self.world, shape.numel(), on=self.device)

    def copy_(self, source: StandInTensor) -> None:
        for i in range(self.nbytes):  # byte by byte, backwards: it is strided
            self.world.gpu.move(self.world.stream, self.address + self.nbytes - 1 - i, source.address + i, 1)


@dataclass
class World:
    gpu: Gpu
    stream: int

    def tensors(self, seed: int, *, strided_bytes: int = 300) -> list[StandInTensor]:
        choice = random.Random(seed)
        self.gpu.seed(seed)
        made = [StandInTensor(self, choice.choice((0, 1, 5, 4096, 70_001, 300_000))) for _ in range(6)]
        made.append(StandInTensor(self, strided_bytes, strided=True))
        choice.shuffle(made)
        return made


class Host:
    """A host image with room for the tensors, and where each goes."""

    def __init__(self, tensors: list[StandInTensor]) -> None:
        self.nbytes = sum(tensor.nbytes + 64 for tensor in tensors)
        self._memory = ctypes.create_string_buffer(self.nbytes)
        self.address = ctypes.addressof(self._memory)
        self.copies: list[tuple[int, StandInTensor]] = []
        at = 0
        for tensor in tensors:
            self.copies.append((self.address + at, tensor))
            at += tensor.nbytes + 64

    def read(self) -> list[bytes]:
        return [ctypes.string_at(address, tensor.nbytes) for address, tensor in self.copies]

    def write(self, contents: list[bytes]) -> None:
        for (address, _), content in zip(self.copies, contents, strict=True):
            ctypes.memmove(address, content, len(content))


def compute(tensors: list[StandInTensor], seed: int) -> list[bytes]:
    contents = [random.Random(seed + i).randbytes(tensor.nbytes) for i, tensor in enumerate(tensors)]
    for tensor, content in zip(tensors, contents, strict=True):
        tensor.compute(content)
    return contents


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    path = tmp_path / "libcuda.so.1"
    shutil.copy(library(), path)
    monkeypatch.setenv("FTRAIN_LIBCUDA", str(path))
    monkeypatch.setattr(device, "find_nvrtc", lambda: [str(path)])
    gpu = Gpu(path)
    gpu.start()
    stream = gpu.stream()

    class CurrentStream:
        def __init__(self, device: torch.device) -> None:
            self.cuda_stream = stream if device == CUDA else 0

    monkeypatch.setattr(torch.cuda, "current_stream", CurrentStream)
    yield World(gpu, stream)
    gpu.finish()


@pytest.mark.parametrize("seed", SEEDS)
def test_tensors_reach_the_host_as_they_were_when_begun(world: World, seed: int) -> None:
    tensors = world.tensors(seed)
    host, copies = Host(tensors), DeviceCopies()
    assert copies.pin(host.address, host.nbytes, [CUDA]) == ""
    contents = compute(tensors, seed)
    ticket = copies.begin(host.copies)
    ticket.order()
    compute(tensors, seed + 100)
    ticket.wait()
    assert host.read() == contents
    assert ticket.done()


@pytest.mark.parametrize("seed", SEEDS)
def test_tensors_dropped_after_begin_live_until_they_are_copied(world: World, seed: int) -> None:
    tensors = world.tensors(seed)
    host, copies = Host(tensors), DeviceCopies()
    copies.pin(host.address, host.nbytes, [CUDA])
    contents = compute(tensors, seed)
    places = [(address, tensor.nbytes) for address, tensor in host.copies]
    seen = [weakref.ref(tensor) for tensor in tensors if tensor.nbytes and not tensor.strided]
    ticket = copies.begin(host.copies)
    tensors.clear()
    host.copies.clear()
    gc.collect()
    assert all(tensor() is not None for tensor in seen)
    ticket.wait()
    assert [ctypes.string_at(address, nbytes) for address, nbytes in places] == contents
    assert all(tensor() is None for tensor in seen)


@pytest.mark.parametrize("seed", SEEDS)
def test_upload_fills_tensors_before_later_work(world: World, seed: int) -> None:
    tensors = world.tensors(seed)
    host, back, copies = Host(tensors), Host(tensors), DeviceCopies()
    for one in (host, back):
        copies.pin(one.address, one.nbytes, [CUDA])
    compute(tensors, seed)
    contents = [random.Random(seed - 1).randbytes(tensor.nbytes) for tensor in tensors]
    host.write(contents)
    ticket = copies.upload(host.copies)
    plain = [(address, tensor) for address, tensor in back.copies if not tensor.strided]
    copies.begin(plain).wait()
    for (address, tensor), content in zip(back.copies, contents, strict=True):
        if not tensor.strided:
            assert ctypes.string_at(address, tensor.nbytes) == content
    ticket.wait()
    world.gpu.drain()
    assert [tensor.elements() for tensor in tensors] == contents


def test_same_places_are_planned_once(world: World) -> None:
    tensors = [tensor for tensor in world.tensors(1) if not tensor.strided]
    host, copies = Host(tensors), DeviceCopies()
    copies.pin(host.address, host.nbytes, [CUDA])
    for step in range(3):
        contents = compute(tensors, step)
        copies.begin(host.copies).wait()
        assert host.read() == contents
        assert world.gpu.count("cuMemcpyHtoDAsync_v2") == 1


def test_places_that_change_each_time_do_not_pile_up(world: World) -> None:
    tensors = [tensor for tensor in world.tensors(1) if not tensor.strided]
    copies = DeviceCopies()
    hosts = [Host(tensors) for _ in range(2 * PLANS_MAX)]
    for step, host in enumerate(hosts):
        copies.pin(host.address, host.nbytes, [CUDA])
        contents = compute(tensors, step)
        copies.begin(host.copies).wait()
        assert host.read() == contents
    assert world.gpu.living()["host"] <= PLANS_MAX + 1


def image_of(slots: int) -> list[Image]:
    fd = _native.memory_file("arena")
    os.ftruncate(fd, slots << 20)
    mapping = _native.Mapping(fd, slots << 20)
    os.close(fd)
    return [Image(mapping.address + (i << 20), 1 << 20, mapping) for i in range(slots)]


def test_image_is_pinned_once_and_let_go_when_the_arena_has_moved(world: World) -> None:
    tensors = [StandInTensor(world, nbytes) for nbytes in (5000, 300_000)]
    copies = DeviceCopies()
    for images in (image_of(2), image_of(3)):
        for step in range(6):
            image = images[step % len(images)]
            contents = compute(tensors, step)
            places = [image.address, image.address + 8192]
            copies.begin(list(zip(places, tensors, strict=True)), image).wait()
            assert [
                ctypes.string_at(place, len(content)) for place, content in zip(places, contents, strict=True)
            ] == contents
        assert world.gpu.living()["registered"] == len(images)
    assert world.gpu.count("cuMemHostRegister_v2") == 5
    assert copies.hindrances() == []


def test_arena_that_is_reserved_is_pinned_before_the_first_snapshot(world: World) -> None:
    tensor, images, stager = StandInTensor(world, 5000), image_of(2), Stager()
    assert stager.pin(images, [torch.zeros(3)]) == ""
    assert "registered" not in world.gpu.living()
    assert stager.pin(images, [tensor]) == ""  # type: ignore[list-item]
    assert world.gpu.living()["registered"] == 2
    for image in images:
        content = compute([tensor], 1)
        stager._copies_of_devices().begin([(image.address, tensor)], image).wait()
        assert ctypes.string_at(image.address, 5000) == content[0]
    assert world.gpu.count("cuMemHostRegister_v2") == 2


def test_what_an_arena_holds_goes_to_the_device_from_there(world: World) -> None:
    device._uploads.cache_clear()
    tensors = world.tensors(3)
    [image] = image_of(1)
    contents = [random.Random(i).randbytes(tensor.nbytes) for i, tensor in enumerate(tensors)]
    copies, at = [], image.address
    for tensor, content in zip(tensors, contents, strict=True):
        ctypes.memmove(at, content, len(content))
        copies.append((at, tensor))
        at += (tensor.nbytes + 4095) // 4096 * 4096
    for _ in range(2):
        compute(tensors, 9)
        begin_upload(copies, image).wait()
        world.gpu.drain()
        assert [tensor.elements() for tensor in tensors] == contents
    assert world.gpu.count("cuMemHostRegister_v2") == 1
    device._uploads.cache_clear()


def test_tensor_in_the_place_of_another_is_copied_as_it_is(world: World) -> None:
    """The same memory and object, another layout: what an allocator may give after the first is gone."""
    tensor = StandInTensor(world, 5000)
    host, copies = Host([tensor]), DeviceCopies()
    copies.pin(host.address, host.nbytes, [CUDA])
    for strided in (False, True, False):
        tensor.strided = strided
        contents = compute([tensor], 1)
        copies.begin(host.copies).wait()
        assert host.read() == contents
    tensor.nbytes = 100
    host.write([bytes(5000)])
    copies.begin(host.copies).wait()
    assert ctypes.string_at(host.address, 5000) == contents[0][:100] + bytes(4900)


def test_tensors_of_two_devices_are_copied_by_both(world: World) -> None:
    other = torch.device("cuda", 1)
    tensors = [StandInTensor(world, 5000, on=on) for on in (CUDA, other, CUDA)]
    host, copies = Host(tensors), DeviceCopies()
    assert copies.pin(host.address, host.nbytes, [CUDA]) == ""
    contents = compute(tensors, 1)
    world.gpu.drain()
    ticket = copies.begin(host.copies)
    ticket.order()
    ticket.wait()
    assert host.read() == contents
    assert world.gpu.living()["registered"] == 1
    copies.unpin(host.address, host.nbytes)
    assert "registered" not in world.gpu.living()


def test_memory_given_back_and_pinned_again_is_copied_to(world: World) -> None:
    tensors = [StandInTensor(world, 5000)]
    host, copies = Host(tensors), DeviceCopies()
    for step in range(3):
        copies.pin(host.address, host.nbytes, [CUDA])
        contents = compute(tensors, step)
        copies.begin(host.copies)  # dropped, so complete
        assert host.read() == contents
        copies.unpin(host.address, host.nbytes)


def test_pinning_that_is_refused_says_why(world: World) -> None:
    tensors = [StandInTensor(world, 5000)]
    host, copies = Host(tensors), DeviceCopies()
    world.gpu.fail("cuMemHostRegister_v2", 1, OUT_OF_MEMORY)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in copies.pin(host.address, host.nbytes, [CUDA])
    contents = compute(tensors, 1)
    copies.begin(host.copies).wait()
    assert host.read() == contents


def test_nothing_to_copy_is_done_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTRAIN_LIBCUDA", str(tmp_path / "none"))
    copies = DeviceCopies()
    ticket = copies.begin([(4096, torch.empty(0))])
    ticket.order()
    ticket.wait()
    assert ticket.done()
    assert copies.pin(4096, 4096, []) == ""
    with pytest.raises(_native.CudaFailure, match="there is no CUDA driver"):
        copies.pin(4096, 4096, [CUDA])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_tensors_of_all_kinds_go_to_the_host_and_back_on_a_real_gpu() -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    base = torch.randn(300, 701, generator=generator, device="cuda")
    tensors = [
        base, base.t(), base[::3, 1:], base.to(torch.bfloat16), base.to(torch.float8_e4m3fn), base > 0,
        torch.view_as_complex(base[:, :700].reshape(300, 350, 2).contiguous()).conj(), base[0, 0],
        base.to(torch.uint8).flatten()[3:77], torch.randn(5_000_000, generator=generator, device="cuda"),
        *torch.randn(400, 1024, generator=generator, device="cuda").unbind(),
    ]  # fmt: skip
    expected = [tensor.resolve_conj().cpu().contiguous() for tensor in tensors]
    nbytes = sum((tensor.nbytes + 4095) // 4096 * 4096 for tensor in tensors)
    memory = torch.zeros(nbytes, dtype=torch.uint8)
    pairs, at = [], memory.data_ptr()
    for tensor in tensors:
        pairs.append((at, tensor))
        at += (tensor.nbytes + 4095) // 4096 * 4096
    copies = DeviceCopies()
    assert copies.pin(memory.data_ptr(), nbytes, [CUDA]) == ""
    ticket = copies.begin(pairs)
    ticket.order()
    targets = [torch.empty_like(tensor).zero_() for tensor in tensors]
    ticket.wait()
    for (address, _), plain in zip(pairs, expected, strict=True):
        assert ctypes.string_at(address, plain.nbytes) == plain.flatten().view(torch.uint8).numpy().tobytes()
    copies.upload([(address, target) for (address, _), target in zip(pairs, targets, strict=True)]).wait()
    for target, plain in zip(targets, expected, strict=True):
        assert torch.equal(target.resolve_conj().cpu().flatten().view(torch.uint8), plain.flatten().view(torch.uint8))
    copies.unpin(memory.data_ptr(), nbytes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_digest_on_a_real_gpu_is_that_of_the_host() -> None:
    tensor = torch.randn(1_000_003, device="cuda")
    stager = _native.CudaStager(0, device.find_nvrtc())
    plain = tensor.cpu()
    stream = torch.cuda.current_stream().cuda_stream
    for start, nbytes in [(0, tensor.nbytes), (4, 4_000_000), (1, 7)]:
        expected = _native.digest_address(plain.data_ptr() + start, nbytes)
        assert stager.digest([(tensor.data_ptr() + start, nbytes)], stream) == [expected]

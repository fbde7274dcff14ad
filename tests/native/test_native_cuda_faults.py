"""Every driver call that is made fails once: a clear error or none, nothing leaked, no copy left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrain import _native
from tests.native.standin.copies import Image
from tests.native.standin.gpu import ILLEGAL_ADDRESS, Gpu, library, required_functions, without

BATCHES = ["cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"]
COMPILER = [
    "nvrtcCreateProgram", "nvrtcCompileProgram", "nvrtcGetProgramLogSize", "nvrtcGetProgramLog",
    "nvrtcGetCUBINSize", "nvrtcGetCUBIN",
]  # fmt: skip
NAMES_ONLY = ["cuGetErrorName", "cuGetErrorString"]
# They end something: the driver does it, and what it reports is an earlier call's failure, which was raised then.
ENDINGS = {
    "cuDevicePrimaryCtxRelease_v2", "cuCtxPopCurrent_v2", "cuStreamDestroy_v2", "cuEventDestroy_v2", "cuMemFree_v2",
    "cuMemFreeHost", "cuMemHostUnregister", "cuModuleUnload",
}  # fmt: skip
# Used only where something has gone wrong or is dropped; without kernels, the batch does.
QUIET = {"cuStreamSynchronize", "cuDeviceGetAttribute", "cuModuleLoadData", "cuModuleGetFunction", *COMPILER}
USES_MAX = 4  # of one function, of which each in turn is made to fail


def use_everything(gpu: Gpu, seed: int, *, kernels: bool = True) -> None:
    """One life of a stager, with every kind of work in it. Asserts the bytes where it gets that far."""
    stager = _native.CudaStager(0, [gpu.path] if kernels else [])
    image, compute = Image(gpu, seed, count=12), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    content = image.compute(compute, seed)
    ticket = stager.begin(image.copies, compute, keep=image)
    ticket.order(compute)
    image.compute(compute, seed + 1)
    ticket.done()
    ticket.wait()
    assert image.host() == image.host_after(content)
    plan = stager.plan(image.copies, upload=True)
    plan.begin(compute, keep=image)
    plan.begin(compute, keep=image).wait()
    if kernels and stager.small_copies()[0] == "kernel":
        stager.digest([(device, nbytes) for _, device, nbytes in image.copies], compute)
    pin.close()


def failure_of(gpu: Gpu, seed: int) -> str | None:
    try:
        use_everything(gpu, seed)
    except _native.CudaFailure as failure:
        return str(failure)
    return None


def fresh_gpu(path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Gpu:
    monkeypatch.setenv("FTRAIN_LIBCUDA", str(path))
    return Gpu(path, seed)


@pytest.mark.parametrize("function", [name for name in required_functions() if name not in NAMES_ONLY] + COMPILER)
def test_call_that_fails_gives_a_clear_error_and_leaks_nothing(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = 0
    for nth in range(1, USES_MAX + 1):
        path = tmp_path / f"libcuda-{nth}.so.1"
        path.write_bytes(library().read_bytes())
        gpu = fresh_gpu(path, monkeypatch, nth)
        if function not in ("cuInit", "cuDriverGetVersion", "cuDeviceGetCount"):  # made once, when it is opened
            assert _native.cuda_probe().usable
        gpu.start()
        gpu.fail(function, nth)
        said = failure_of(gpu, seed=nth)
        if said is not None:
            assert f"{function} failed with CUDA_ERROR_ILLEGAL_ADDRESS (700" in said
            assert not said.startswith(function), "what was attempted comes first"
            raised += 1
        gpu.finish()
    if function not in ENDINGS | QUIET:
        assert raised > 0, f"no use of {function} was seen to fail"


@pytest.mark.parametrize("function", BATCHES)
def test_batch_that_fails_gives_a_clear_error_and_leaks_nothing(
    function: str, driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = without(driver, tmp_path / "libcuda-other.so.1", [name for name in BATCHES if name != function])
    if function == "cuMemcpyBatchAsync_v2":
        other = driver
    gpu = fresh_gpu(other, monkeypatch, 1)
    gpu.start()
    gpu.fail(function, 1)
    with pytest.raises(_native.CudaFailure, match=f"copying a batch on device 0: {function} failed"):
        use_everything(gpu, seed=1, kernels=False)
    gpu.finish()


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction", "cuDeviceGetAttribute", *COMPILER[:2]])
def test_kernels_that_cannot_be_had_leave_the_drivers_batch_and_a_reason(gpu: Gpu, function: str) -> None:
    gpu.fail(function, 1)
    stager = _native.CudaStager(0, [gpu.path])
    how, reason = stager.small_copies()
    assert how == "batch"
    assert f"{function} failed" in reason
    assert stager.small_copies() == (how, reason)  # and it is not tried for each plan again
    image = Image(gpu, seed=1)
    pin = stager.pin(image.address, image.nbytes)
    content = image.compute(0, 1)
    stager.begin(image.copies, 0).wait()
    assert image.host() == image.host_after(content)
    pin.close()


def test_compiler_that_refuses_is_quoted(gpu: Gpu) -> None:
    gpu.fail("nvrtcCompileProgram", 1, 6)
    with pytest.raises(_native.CudaFailure, match=r"nvrtcResult 6: kernels.cu\(1\): error: as the test wanted$"):
        _native.cuda_compile((9, 0), [gpu.path])


@pytest.mark.parametrize("function", ["cuMemcpyDtoHAsync_v2", "cuEventRecord"])
@pytest.mark.parametrize("nth", [2, 3])
def test_copies_begun_before_a_failure_are_over_when_it_is_raised(gpu: Gpu, function: str, nth: int) -> None:
    stager = _native.CudaStager(0, [gpu.path])
    image, compute = Image(gpu, seed=1, count=9, sizes=[300_000, 16_000]), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    plan = stager.plan(image.copies)
    plan.begin(compute).wait()
    image.compute(compute, 1)
    gpu.fail(function, nth)
    with pytest.raises(_native.CudaFailure, match=f"{function} failed"):
        _ = [plan.begin(compute) for _ in range(2)]
    seen = image.host()
    gpu.drain()
    assert image.host() == seen
    pin.close()


@pytest.mark.parametrize("seed", range(8))
def test_wait_that_fails_raises_and_the_drop_still_waits(gpu: Gpu, seed: int) -> None:
    stager = _native.CudaStager(0, [gpu.path])
    image, compute = Image(gpu, seed), gpu.stream()
    pin = stager.pin(image.address, image.nbytes)
    content = image.compute(compute, seed)
    ticket = stager.begin(image.copies, compute)
    gpu.fail("cuEventSynchronize", 1)
    gpu.fail("cuEventSynchronize", 2)
    with pytest.raises(_native.CudaFailure, match="waiting for copies on device 0: cuEventSynchronize"):
        ticket.wait()
    del ticket
    assert image.host() == image.host_after(content)
    pin.close()


def test_error_without_a_name_is_given_by_number(gpu: Gpu) -> None:
    gpu.fail("cuStreamCreateWithPriority", 1, 12345)
    with pytest.raises(_native.CudaFailure, match="an unknown error \\(12345"):
        _native.CudaStager(0)


def test_device_that_is_not_there_is_named(gpu: Gpu) -> None:
    with pytest.raises(_native.CudaFailure, match="finding the device on device 7: cuDeviceGet failed"):
        _native.CudaStager(7)


def test_pinning_in_a_broken_context_raises(gpu: Gpu) -> None:
    stager = _native.CudaStager(0)
    image = Image(gpu, seed=1)
    gpu.fail("cuMemHostRegister_v2", 1, ILLEGAL_ADDRESS)
    with pytest.raises(_native.CudaFailure, match=r"pinning \d+ bytes of memory for use on device 0"):
        stager.pin(image.address, image.nbytes)

"""Why there is no GPU, said in words. Each in a process of its own where CUDA would leave a trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ftrain import _native
from tests.native.standin.gpu import Gpu, required_functions, without

NO_DEVICE = 100


def test_driver_with_devices_is_usable(driver: Path) -> None:
    probe = _native.cuda_probe()
    assert (probe.usable, probe.reason, probe.driver_version, probe.devices) == (True, "", 13000, 2)


def test_machine_without_a_driver_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAIN_LIBCUDA", str(tmp_path / "libcuda.so.1"))
    probe = _native.cuda_probe()
    assert not probe.usable
    assert probe.reason.startswith("there is no CUDA driver: ")
    assert str(tmp_path) in probe.reason
    assert (probe.driver_version, probe.devices) == (0, 0)


@pytest.mark.parametrize("function", required_functions())
def test_driver_that_lacks_a_function_is_told_which(
    function: str, driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = without(driver, tmp_path / "libcuda-old.so.1", [function])
    monkeypatch.setenv("FTRAIN_LIBCUDA", str(old))
    assert _native.cuda_probe().reason == f"the CUDA driver {old} is too old: it has no function {function}"
    with pytest.raises(_native.CudaFailure, match=function):
        _native.CudaStager(0)


def test_driver_that_does_not_start_is_told_with_its_error(driver: Path) -> None:
    Gpu(driver).fail("cuInit", 1, NO_DEVICE)
    assert _native.cuda_probe().reason.startswith("starting CUDA: cuInit failed with CUDA_ERROR_NO_DEVICE (100")
    assert _native.cuda_probe().usable, "asked again, it is tried again"


@pytest.mark.parametrize("function", ["cuDriverGetVersion", "cuDeviceGetCount"])
def test_driver_that_does_not_answer_is_told_with_its_error(driver: Path, function: str) -> None:
    Gpu(driver).fail(function, 1, 999)
    assert f"{function} failed with CUDA_ERROR_UNKNOWN" in _native.cuda_probe().reason


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORKED = """
import os
from ftrain import _native
{before}
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    try:
        os.write(writing, _native.cuda_probe().reason.encode())
        {in_child}
    except _native.CudaFailure as failure:
        os.write(writing, b"; " + str(failure).encode())
    finally:
        os._exit(0)
os.close(writing)
os.waitpid(child, 0)
print(os.read(reading, 4096).decode())
"""


def test_forked_child_of_a_process_that_probed_is_told_so(driver: Path) -> None:
    said = run(FORKED.format(before="assert _native.cuda_probe().usable", in_child="_native.CudaStager(0)"))
    reason, failure = said.strip().split("; this", 1)
    assert "forked from one that had used CUDA" in reason
    assert "forked from one that had used CUDA" in failure


def test_forked_child_of_a_process_where_somebody_else_used_cuda_is_told_so(driver: Path) -> None:
    other = f"import ctypes; ctypes.CDLL({str(driver)!r}).cuInit(0)"
    said = run(FORKED.format(before=other, in_child="_native.CudaStager(0)"))
    assert "cuInit failed with CUDA_ERROR_NOT_INITIALIZED" in said and "perhaps this process was forked" in said


def test_forked_child_of_a_process_that_did_not_may_use_cuda(driver: Path) -> None:
    said = run(FORKED.format(before="pass", in_child="print('made', _native.CudaStager(0).device, flush=True)"))
    assert said.startswith("made 0")


def test_what_a_forked_child_inherits_is_dropped_without_a_call(driver: Path) -> None:
    before = f"""
import ctypes
memory = ctypes.create_string_buffer(1 << 16)
stager = _native.CudaStager(0, [{str(driver)!r}])
pin = stager.pin(ctypes.addressof(memory), 1 << 16)
ticket = stager.begin([], 0)
plan = stager.plan([])
"""
    in_child = f"""
        count = ctypes.CDLL({str(driver)!r}).standin_count
        names = [b"cuCtxPushCurrent_v2", b"cuDevicePrimaryCtxRelease_v2", b"cuStreamDestroy_v2"]
        counts = [count(name) for name in names]
        pin.close()
        del ticket, plan, pin, stager
        os.write(writing, b" untouched " if counts == [count(name) for name in names] else b" touched ")
"""
    said = run(FORKED.format(before=before, in_child=in_child.strip()))
    assert " untouched " in said


def test_import_touches_no_driver(driver: Path) -> None:
    program = "import ftrain, ftrain.checkpoint.staging.device; print('libcuda' in open('/proc/self/maps').read())"
    assert run(program).strip() == "False"

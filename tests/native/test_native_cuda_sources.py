"""What runs only on a GPU is compiled without one: kernels.cu, and the table of the driver beside cuda.h."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ftrain import _native
from ftrain.checkpoint.staging.device import find_nvrtc
from tests.native.standin.gpu import CUDA_SOURCES

KERNELS = ["ftrain_gather", "ftrain_scatter", "ftrain_digest"]
NO_NVRTC = "there is no NVRTC"


def cuda_home() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    return next((Path(home) for home in homes if home and (Path(home) / "bin" / "nvcc").exists()), None)


needs_toolkit = pytest.mark.skipif(cuda_home() is None, reason="no CUDA toolkit on this machine")


@needs_toolkit
def test_kernels_compile_with_nvcc(tmp_path: Path) -> None:
    home = cuda_home()
    assert home is not None
    ptx = tmp_path / "kernels.ptx"
    command = [home / "bin" / "nvcc", "-ptx", "-arch=sm_90", "-Werror=all-warnings", CUDA_SOURCES / "kernels.cu"]
    subprocess.run([*command, "-o", ptx], check=True)
    text = ptx.read_text()
    assert all(f".visible .entry {kernel}(" in text for kernel in KERNELS)
    assert "ld.v4.u32" in text and "st.v4.u32" in text, "the wide path is 16 bytes wide"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_kernels_in_the_module_compile_with_nvrtc(capability: tuple[int, int]) -> None:
    try:
        code = _native.cuda_compile(capability, find_nvrtc())
    except _native.CudaFailure as failure:
        if NO_NVRTC not in str(failure):
            raise
        pytest.skip("no NVRTC on this machine")
    assert code.startswith(b"\x7fELF")
    assert all(kernel.encode() in code for kernel in KERNELS)


def test_compiler_that_is_nowhere_is_named() -> None:
    with pytest.raises(_native.CudaFailure, match=r"looked for /nowhere/libnvrtc\.so\.13"):
        _native.cuda_compile((9, 0), ["/nowhere/libnvrtc.so.13"])


ABI = """
#include "table.hpp"  // first: cuda.h has macros of these names
#include <cuda.h>
#include <type_traits>

// Two types are passed alike: pointers as pointers, and numbers of one size and kind.
template <class Ours, class Theirs>
constexpr bool alike = sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
    (std::is_integral_v<Ours> || std::is_pointer_v<Ours>) && (std::is_integral_v<Theirs> ||
     std::is_enum_v<Theirs> || std::is_pointer_v<Theirs>);

template <class Ours, class Theirs>
struct Same : std::false_type {};
template <class... A, class R, class... B>
    requires(sizeof...(A) == sizeof...(B))
struct Same<int (*)(A...), R (*)(B...)> : std::bool_constant<sizeof(R) == sizeof(int) && (alike<A, B> && ...)> {};

using ftrain::cuda::Table;
#define SAME(ours, theirs) Same<decltype(Table{}.ours.pointer), decltype(&::theirs)>::value
#define COMPARE(name, ...) static_assert(SAME(name, name), #name);
FTRAIN_CUDA_REQUIRED(COMPARE)
#if CUDA_VERSION >= 13000
static_assert(SAME(cuMemcpyBatchAsync_v2, cuMemcpyBatchAsync));
#elif CUDA_VERSION >= 12080
static_assert(SAME(cuMemcpyBatchAsync, cuMemcpyBatchAsync));
#endif
#if CUDA_VERSION >= 12080
using Attributes = ftrain::cuda::BatchAttributes;
static_assert(sizeof(Attributes) == sizeof(CUmemcpyAttributes));
static_assert(offsetof(Attributes, source_access_order) == offsetof(CUmemcpyAttributes, srcAccessOrder));
static_assert(offsetof(Attributes, source_location_type) == offsetof(CUmemcpyAttributes, srcLocHint));
static_assert(offsetof(Attributes, destination_location_type) == offsetof(CUmemcpyAttributes, dstLocHint));
static_assert(offsetof(Attributes, flags) == offsetof(CUmemcpyAttributes, flags));
static_assert(ftrain::cuda::ACCESS_ORDER_STREAM == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
#endif
static_assert(ftrain::cuda::NOT_INITIALIZED == CUDA_ERROR_NOT_INITIALIZED);
static_assert(ftrain::cuda::OUT_OF_MEMORY == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(ftrain::cuda::INVALID_VALUE == CUDA_ERROR_INVALID_VALUE);
static_assert(ftrain::cuda::OPERATING_SYSTEM == CUDA_ERROR_OPERATING_SYSTEM);
static_assert(ftrain::cuda::NOT_READY == CUDA_ERROR_NOT_READY);
static_assert(ftrain::cuda::ALREADY_REGISTERED == CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
static_assert(ftrain::cuda::NOT_PERMITTED == CUDA_ERROR_NOT_PERMITTED);
static_assert(ftrain::cuda::NOT_SUPPORTED == CUDA_ERROR_NOT_SUPPORTED);
static_assert(ftrain::cuda::CAPABILITY_MAJOR == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(ftrain::cuda::CAPABILITY_MINOR == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(ftrain::cuda::STREAM_NON_BLOCKING == CU_STREAM_NON_BLOCKING);
static_assert(ftrain::cuda::EVENT_BLOCKING_SYNC == CU_EVENT_BLOCKING_SYNC);
static_assert(ftrain::cuda::EVENT_DISABLE_TIMING == CU_EVENT_DISABLE_TIMING);
static_assert(ftrain::cuda::HOST_PORTABLE == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(ftrain::cuda::HOST_PORTABLE == CU_MEMHOSTALLOC_PORTABLE);
static_assert(ftrain::cuda::HOST_DEVICE_MAP == CU_MEMHOSTREGISTER_DEVICEMAP);
static_assert(ftrain::cuda::HOST_DEVICE_MAP == CU_MEMHOSTALLOC_DEVICEMAP);
"""


@needs_toolkit
def test_table_of_the_driver_is_as_cuda_h_declares_it(tmp_path: Path) -> None:
    home = cuda_home()
    assert home is not None
    source = tmp_path / "abi.cpp"
    source.write_text(ABI)
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{home / 'include'}", f"-I{CUDA_SOURCES}", str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

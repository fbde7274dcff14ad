// The functions of the CUDA driver that are used here, as cuda.h declares them: found at run time, never linked.
//
// The names are those in the library, with their versions: the plain name of some is an older function of another shape.
// tests/native/test_native_cuda_abi.py compares all of this with cuda.h where there is one.
#pragma once

#include <cstddef>

namespace ftrain::cuda {

using Result = int;
using Device = int;
using DeviceAddress = unsigned long long;
using ContextHandle = struct ContextOpaque*;
using StreamHandle = struct StreamOpaque*;
using EventHandle = struct EventOpaque*;
using ModuleHandle = struct ModuleOpaque*;
using FunctionHandle = struct FunctionOpaque*;

struct BatchAttributes {  // CUmemcpyAttributes
    int source_access_order;
    int source_location_type, source_location_id;
    int destination_location_type, destination_location_id;
    unsigned flags;
};

constexpr Result SUCCESS = 0;
constexpr Result INVALID_VALUE = 1;
constexpr Result OUT_OF_MEMORY = 2;
constexpr Result NOT_INITIALIZED = 3;
constexpr Result NO_DEVICE = 100;
constexpr Result OPERATING_SYSTEM = 304;
constexpr Result NOT_READY = 600;
constexpr Result ALREADY_REGISTERED = 712;
constexpr Result NOT_PERMITTED = 800;
constexpr Result NOT_SUPPORTED = 801;

constexpr int CAPABILITY_MAJOR = 75;  // CUdevice_attribute
constexpr int CAPABILITY_MINOR = 76;
constexpr unsigned STREAM_NON_BLOCKING = 1;  // no implicit order with stream 0
constexpr unsigned EVENT_BLOCKING_SYNC = 1;  // a waiting thread sleeps
constexpr unsigned EVENT_DISABLE_TIMING = 2;
constexpr unsigned HOST_PORTABLE = 1;  // for every context of the process; of cuMemHostRegister and cuMemHostAlloc alike
constexpr unsigned HOST_DEVICE_MAP = 2;
constexpr int ACCESS_ORDER_STREAM = 1;  // CUmemcpySrcAccessOrder

// A call's result with the name of the function, so that an error can say it.
struct Outcome {
    const char* call;
    Result result;
};

template <class... Parameters>
struct Function {
    const char* name;
    Result (*pointer)(Parameters...);

    explicit operator bool() const noexcept { return pointer != nullptr; }
    Outcome operator()(Parameters... arguments) const { return {name, pointer(arguments...)}; }
};

#define FTRAIN_CUDA_REQUIRED(X)                                                                                  \
    X(cuInit, unsigned)                                                                                          \
    X(cuDriverGetVersion, int*)                                                                                  \
    X(cuGetErrorName, Result, const char**)                                                                      \
    X(cuGetErrorString, Result, const char**)                                                                    \
    X(cuDeviceGetCount, int*)                                                                                    \
    X(cuDeviceGet, Device*, int)                                                                                 \
    X(cuDeviceGetAttribute, int*, int, Device)                                                                   \
    X(cuDevicePrimaryCtxRetain, ContextHandle*, Device)                                                          \
    X(cuDevicePrimaryCtxRelease_v2, Device)                                                                      \
    X(cuCtxPushCurrent_v2, ContextHandle)                                                                        \
    X(cuCtxPopCurrent_v2, ContextHandle*)                                                                        \
    X(cuCtxGetStreamPriorityRange, int*, int*)                                                                   \
    X(cuStreamCreateWithPriority, StreamHandle*, unsigned, int)                                                  \
    X(cuStreamDestroy_v2, StreamHandle)                                                                          \
    X(cuStreamWaitEvent, StreamHandle, EventHandle, unsigned)                                                    \
    X(cuStreamSynchronize, StreamHandle)                                                                         \
    X(cuEventCreate, EventHandle*, unsigned)                                                                     \
    X(cuEventRecord, EventHandle, StreamHandle)                                                                  \
    X(cuEventQuery, EventHandle)                                                                                 \
    X(cuEventSynchronize, EventHandle)                                                                           \
    X(cuEventDestroy_v2, EventHandle)                                                                            \
    X(cuMemAlloc_v2, DeviceAddress*, std::size_t)                                                                \
    X(cuMemFree_v2, DeviceAddress)                                                                               \
    X(cuMemHostAlloc, void**, std::size_t, unsigned)                                                             \
    X(cuMemFreeHost, void*)                                                                                      \
    X(cuMemHostRegister_v2, void*, std::size_t, unsigned)                                                        \
    X(cuMemHostUnregister, void*)                                                                                \
    X(cuMemHostGetDevicePointer_v2, DeviceAddress*, void*, unsigned)                                             \
    X(cuMemcpyDtoHAsync_v2, void*, DeviceAddress, std::size_t, StreamHandle)                                     \
    X(cuMemcpyHtoDAsync_v2, DeviceAddress, const void*, std::size_t, StreamHandle)                               \
    X(cuModuleLoadData, ModuleHandle*, const void*)                                                              \
    X(cuModuleUnload, ModuleHandle)                                                                              \
    X(cuModuleGetFunction, FunctionHandle*, ModuleHandle, const char*)                                           \
    X(cuLaunchKernel, FunctionHandle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,      \
      StreamHandle, void**, void**)

// Of driver 12.8 (with a place for the index that failed) and of 13.0 (without).
#define FTRAIN_CUDA_OPTIONAL(X)                                                                                  \
    X(cuMemcpyBatchAsync, DeviceAddress*, DeviceAddress*, std::size_t*, std::size_t, BatchAttributes*,           \
      std::size_t*, std::size_t, std::size_t*, StreamHandle)                                                     \
    X(cuMemcpyBatchAsync_v2, DeviceAddress*, DeviceAddress*, std::size_t*, std::size_t, BatchAttributes*,        \
      std::size_t*, std::size_t, StreamHandle)

struct Table {
#define FTRAIN_CUDA_MEMBER(name, ...) Function<__VA_ARGS__> name{#name, nullptr};
    FTRAIN_CUDA_REQUIRED(FTRAIN_CUDA_MEMBER)
    FTRAIN_CUDA_OPTIONAL(FTRAIN_CUDA_MEMBER)
#undef FTRAIN_CUDA_MEMBER
};

}  // namespace ftrain::cuda

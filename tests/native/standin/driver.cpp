// The functions of libcuda.so.1 that ftrain uses, and a few more for the tests' own work on the "GPU".
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "faults.hpp"
#include "kernels.hpp"
#include "machine.hpp"

using namespace standin;

namespace {

constexpr int OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
              INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
              ALREADY_REGISTERED = 712, NOT_REGISTERED = 713;
constexpr int DEVICES = 2;

thread_local std::vector<Context*> stack;

pid_t started_in = 0;

// What every function does first: it takes the machine, lets time pass, and sees whether it is to fail.
class Call {
public:
    explicit Call(const char* name) : lock(machine().mutex) {
        machine().wander();
        fault = faults().use(name);
    }
    std::unique_lock<std::mutex> lock;
    int fault;
};

Context* current() {
    return stack.empty() ? nullptr : stack.back();
}

// A function that makes or does something: not done at all when it is to fail.
#define ENTER(name)                                    \
    Call call(#name);                                  \
    Machine& m = machine();                            \
    if (call.fault != OK) return call.fault;           \
    if (!m.initialized) return NOT_INITIALIZED;        \
    if (started_in != getpid()) return NOT_INITIALIZED

#define ENTER_CONTEXT(name) \
    ENTER(name);            \
    if (current() == nullptr) return INVALID_CONTEXT

// A function that gives something back: it does so even when it reports an error, which is then an earlier one's.
#define LEAVE(name)                             \
    Call call(#name);                           \
    Machine& m = machine();                     \
    if (!m.initialized) return NOT_INITIALIZED

bool is_living(Event* event) {
    return machine().events.contains(event);
}

}  // namespace

extern "C" {

int cuInit(unsigned flags) {
    Call call("cuInit");
    if (call.fault != OK) return call.fault;
    if (flags != 0) return INVALID_VALUE;
    if (started_in != 0 && started_in != getpid()) return NOT_INITIALIZED;
    started_in = getpid();
    machine().initialized = true;
    return OK;
}

int cuDriverGetVersion(int* version) {
    Call call("cuDriverGetVersion");
    *version = 13000;
    return call.fault;
}

int cuGetErrorName(int code, const char** name) {
    static const std::map<int, const char*> names = {
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
        {100, "CUDA_ERROR_NO_DEVICE"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
        {NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
        {999, "CUDA_ERROR_UNKNOWN"},
    };
    const auto found = names.find(code);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? INVALID_VALUE : OK;
}

int cuGetErrorString(int, const char** text) {
    *text = "as the test wanted";
    return OK;
}

int cuDeviceGetCount(int* count) {
    ENTER(cuDeviceGetCount);
    *count = DEVICES;
    return OK;
}

int cuDeviceGet(int* device, int ordinal) {
    ENTER(cuDeviceGet);
    if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
    *device = ordinal + 10;  // a handle, not the ordinal
    return OK;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    ENTER(cuDeviceGetAttribute);
    if (device < 10 || device >= 10 + DEVICES) return INVALID_DEVICE;
    *value = attribute == 75 ? 9 : 0;
    return OK;
}

int cuDevicePrimaryCtxRetain(Context** context, int device) {
    ENTER(cuDevicePrimaryCtxRetain);
    if (device < 10 || device >= 10 + DEVICES) return INVALID_DEVICE;
    *context = &m.contexts.try_emplace(device, Context{device}).first->second;
    ++(*context)->retained;
    return OK;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    LEAVE(cuDevicePrimaryCtxRelease_v2);
    --m.contexts.at(device).retained;
    return call.fault;
}

int cuCtxPushCurrent_v2(Context* context) {
    ENTER(cuCtxPushCurrent_v2);
    if (context->retained == 0) return INVALID_CONTEXT;
    stack.push_back(context);
    return OK;
}

int cuCtxPopCurrent_v2(Context** context) {
    LEAVE(cuCtxPopCurrent_v2);
    if (stack.empty()) return INVALID_CONTEXT;
    *context = stack.back();
    stack.pop_back();
    return call.fault;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER_CONTEXT(cuCtxGetStreamPriorityRange);
    *least = 0;
    *greatest = -5;
    return OK;
}

int cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) {
    ENTER_CONTEXT(cuStreamCreateWithPriority);
    m.streams.push_back(std::make_unique<Stream>(Stream{current(), flags, false, false, {}}));
    *stream = m.streams.back().get();
    return OK;
}

int cuStreamDestroy_v2(Stream* handle) {
    LEAVE(cuStreamDestroy_v2);
    Stream* stream = handle == nullptr ? nullptr : m.find_stream(handle, current());
    if (stream == nullptr) return INVALID_HANDLE;
    if (!stream->waiting.empty()) m.violations.push_back("a stream was destroyed with work on it");
    std::erase_if(m.streams, [&](const auto& one) { return one.get() == stream; });
    return call.fault;
}

int cuStreamWaitEvent(Stream* handle, Event* event, unsigned flags) {
    ENTER_CONTEXT(cuStreamWaitEvent);
    Stream* stream = m.find_stream(handle, current());
    if (stream == nullptr || !is_living(event)) return INVALID_HANDLE;
    if (flags != 0) return INVALID_VALUE;
    if (event->last) m.wait_for(*stream, event->last);
    return OK;
}

int cuStreamSynchronize(Stream* handle) {
    ENTER_CONTEXT(cuStreamSynchronize);
    Stream* stream = m.find_stream(handle, current());
    if (stream == nullptr) return INVALID_HANDLE;
    m.run_until(call.lock, [=] { return stream->waiting.empty(); });
    return OK;
}

int cuEventCreate(Event** event, unsigned) {
    ENTER_CONTEXT(cuEventCreate);
    auto made = std::make_unique<Event>(Event{current(), nullptr});
    *event = made.get();
    m.events.emplace(*event, std::move(made));
    return OK;
}

int cuEventDestroy_v2(Event* event) {
    LEAVE(cuEventDestroy_v2);
    return m.events.erase(event) == 0 ? INVALID_HANDLE : call.fault;
}

int cuEventRecord(Event* event, Stream* handle) {
    ENTER_CONTEXT(cuEventRecord);
    Stream* stream = m.find_stream(handle, current());
    if (stream == nullptr || !is_living(event) || event->context != stream->context) return INVALID_HANDLE;
    event->last = std::make_shared<Mark>();
    m.mark(*stream, event->last);
    return OK;
}

int cuEventQuery(Event* event) {
    ENTER_CONTEXT(cuEventQuery);
    if (!is_living(event)) return INVALID_HANDLE;
    m.step();  // asleep or not: who polls must see an end of it
    return event->last && !event->last->reached ? NOT_READY : OK;
}

int cuEventSynchronize(Event* event) {
    ENTER_CONTEXT(cuEventSynchronize);
    if (!is_living(event)) return INVALID_HANDLE;
    m.run_until(call.lock, [mark = event->last] { return !mark || mark->reached; });
    return OK;
}

int cuMemAlloc_v2(Address* address, std::size_t nbytes) {
    ENTER_CONTEXT(cuMemAlloc_v2);
    if (nbytes == 0) return INVALID_VALUE;
    *address = m.allocate(nbytes);
    return OK;
}

int cuMemFree_v2(Address address) {
    LEAVE(cuMemFree_v2);
    return m.free(address) ? call.fault : INVALID_VALUE;
}

int cuMemHostAlloc(void** data, std::size_t nbytes, unsigned) {
    ENTER_CONTEXT(cuMemHostAlloc);
    auto made = std::make_unique<Allocation>(Allocation{std::vector<char>(nbytes, 0), nullptr, nbytes});
    made->data = made->memory.data();
    *data = made->data;
    m.host.emplace(made->data, std::move(made));
    return OK;
}

int cuMemFreeHost(void* data) {
    LEAVE(cuMemFreeHost);
    const auto found = m.host.find(static_cast<char*>(data));
    if (found == m.host.end()) return INVALID_VALUE;
    m.expect_untouched(found->first, found->second->nbytes, "pinned memory was freed");
    m.host.erase(found);
    return call.fault;
}

int cuMemHostRegister_v2(void* data, std::size_t nbytes, unsigned) {
    ENTER_CONTEXT(cuMemHostRegister_v2);
    if (data == nullptr || nbytes == 0) return INVALID_VALUE;
    if (m.host_kind(data, nbytes) != Machine::Kind::PAGEABLE) return ALREADY_REGISTERED;
    m.registered.emplace(static_cast<char*>(data), nbytes);
    return OK;
}

int cuMemHostUnregister(void* data) {
    LEAVE(cuMemHostUnregister);
    const auto found = m.registered.find(static_cast<char*>(data));
    if (found == m.registered.end()) return NOT_REGISTERED;
    m.expect_untouched(found->first, found->second, "memory was unregistered");
    m.registered.erase(found);
    return call.fault;
}

int cuMemHostGetDevicePointer_v2(Address* address, void* data, unsigned) {
    ENTER_CONTEXT(cuMemHostGetDevicePointer_v2);
    if (m.host_kind(data, 1) != Machine::Kind::PINNED) return INVALID_VALUE;
    *address = reinterpret_cast<Address>(data) | MAPPED_BIT;
    return OK;
}

int cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t nbytes, Stream* handle) {
    ENTER_CONTEXT(cuMemcpyDtoHAsync_v2);
    Stream* stream = m.find_stream(handle, current());
    const char* source = m.device_bytes(from, nbytes);
    const Machine::Kind kind = m.host_kind(to, nbytes);
    if (stream == nullptr) return INVALID_HANDLE;
    if (source == nullptr || kind == Machine::Kind::TORN) return INVALID_VALUE;
    m.copy(*stream, static_cast<char*>(to), source, nbytes);
    if (kind == Machine::Kind::PAGEABLE) {
        m.run_until(call.lock, [=] { return stream->waiting.empty(); });
    }
    return OK;
}

int cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t nbytes, Stream* handle) {
    ENTER_CONTEXT(cuMemcpyHtoDAsync_v2);
    Stream* stream = m.find_stream(handle, current());
    char* destination = m.device_bytes(to, nbytes);
    const Machine::Kind kind = m.host_kind(from, nbytes);
    if (stream == nullptr) return INVALID_HANDLE;
    if (destination == nullptr || kind == Machine::Kind::TORN) return INVALID_VALUE;
    m.copy(*stream, destination, static_cast<const char*>(from), nbytes);
    if (kind == Machine::Kind::PAGEABLE) {
        m.run_until(call.lock, [=] { return stream->waiting.empty(); });
    }
    return OK;
}

static int copy_batch(Machine& m, Address* to, Address* from, std::size_t* nbytes, std::size_t count, Stream* handle) {
    Stream* stream = handle == nullptr ? nullptr : m.find_stream(handle, current());
    if (stream == nullptr || count == 0) return INVALID_VALUE;
    const auto bytes = [&](Address address, std::size_t n) {
        char* host = reinterpret_cast<char*>(address);
        return m.host_kind(host, n) == Machine::Kind::PINNED ? host : m.device_bytes(address, n);
    };
    for (std::size_t i = 0; i < count; ++i) {
        if (bytes(to[i], nbytes[i]) == nullptr || bytes(from[i], nbytes[i]) == nullptr) return INVALID_VALUE;
    }
    for (std::size_t i = 0; i < count; ++i) {
        m.copy(*stream, bytes(to[i], nbytes[i]), bytes(from[i], nbytes[i]), nbytes[i]);
    }
    return OK;
}

int cuMemcpyBatchAsync(Address* to, Address* from, std::size_t* nbytes, std::size_t count, void*, std::size_t*,
                       std::size_t, std::size_t*, Stream* stream) {
    ENTER_CONTEXT(cuMemcpyBatchAsync);
    return copy_batch(m, to, from, nbytes, count, stream);
}

int cuMemcpyBatchAsync_v2(Address* to, Address* from, std::size_t* nbytes, std::size_t count, void*, std::size_t*,
                          std::size_t, Stream* stream) {
    ENTER_CONTEXT(cuMemcpyBatchAsync_v2);
    return copy_batch(m, to, from, nbytes, count, stream);
}

int cuModuleLoadData(Module** module, const void* image) {
    ENTER_CONTEXT(cuModuleLoadData);
    if (std::strncmp(static_cast<const char*>(image), "kernels: ", 9) != 0) return INVALID_IMAGE;
    auto made = std::make_unique<Module>();
    *module = made.get();
    m.modules.emplace(*module, std::move(made));
    return OK;
}

int cuModuleUnload(Module* module) {
    LEAVE(cuModuleUnload);
    for (const auto& stream : m.streams) {
        if (std::ranges::any_of(stream->waiting, [&](const Operation& one) { return one.module == module; })) {
            m.violations.push_back("a module was unloaded under its kernel");
        }
    }
    return m.modules.erase(module) == 0 ? INVALID_HANDLE : call.fault;
}

int cuModuleGetFunction(const Function** function, Module* module, const char* name) {
    ENTER_CONTEXT(cuModuleGetFunction);
    if (!m.modules.contains(module)) return INVALID_HANDLE;
    if (std::strncmp(name, "ftrain_", 7) != 0) return NOT_FOUND;
    *function = &module->functions.try_emplace(name, Function{name, module}).first->second;
    return OK;
}

int cuLaunchKernel(const Function* function, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned ty,
                   unsigned tz, unsigned, Stream* handle, void** parameters, void**) {
    ENTER_CONTEXT(cuLaunchKernel);
    Stream* stream = m.find_stream(handle, current());
    if (stream == nullptr) return INVALID_HANDLE;
    if (blocks == 0 || threads == 0 || threads > 1024 || y * z * ty * tz != 1) return INVALID_VALUE;
    Operation operation = kernel_operation(function->name, blocks, threads, parameters);
    operation.module = function->module;
    m.push(*stream, std::move(operation));
    return OK;
}

}  // extern "C"

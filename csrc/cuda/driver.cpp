#include "driver.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

namespace ftrain::cuda {

namespace {

constexpr const char* LIBRARY = "libcuda.so.1";
constexpr const char* LIBRARY_VARIABLE = "FTRAIN_LIBCUDA";
constexpr const char* FORKED =
    "this process was forked from one that had used CUDA, and CUDA does not survive a fork; "
    "fork before CUDA is used, or spawn the process";

template <class F>
bool find(void* library, F& function) {
    function.pointer = reinterpret_cast<decltype(function.pointer)>(dlsym(library, function.name));
    return function.pointer != nullptr;
}

std::string library_path() {
    const char* path = std::getenv(LIBRARY_VARIABLE);
    return path != nullptr && *path != '\0' ? path : LIBRARY;
}

void* load(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* why = dlerror();
        throw Failure("there is no CUDA driver: " + (why != nullptr ? std::string(why) : path + " cannot be loaded"));
    }
    return library;
}

}  // namespace

const Driver& Driver::open() {
    // By path, so that a test's stand-in and the machine's own can be in one process. Never unloaded: what was made
    // with a driver may be destroyed at any later time.
    static std::mutex mutex;
    static std::map<std::string, std::unique_ptr<Driver>>& drivers = *new std::map<std::string, std::unique_ptr<Driver>>;
    const std::string path = library_path();
    const std::lock_guard lock(mutex);
    std::unique_ptr<Driver>& driver = drivers[path];
    if (!driver) {
        driver.reset(new Driver(load(path), path));
    }
    driver->require_ours();
    return *driver;
}

Driver::Driver(void* library, const std::string& path) : process_(getpid()) {
#define FTRAIN_CUDA_FIND(name, ...)                                                                      \
    if (!find(library, table_.name)) {                                                                   \
        throw Failure("the CUDA driver " + path + " is too old: it has no function " #name);             \
    }
    FTRAIN_CUDA_REQUIRED(FTRAIN_CUDA_FIND)
#undef FTRAIN_CUDA_FIND
    find(library, table_.cuMemcpyBatchAsync);
    find(library, table_.cuMemcpyBatchAsync_v2);

    const Outcome started = table_.cuInit(0);
    if (started.result == NOT_INITIALIZED) {
        // What torch started in the parent we do not see, but this is the driver's answer to it.
        fail(started, std::string("starting CUDA; perhaps ") + FORKED);
    }
    check(started, "starting CUDA");
    check(table_.cuDriverGetVersion(&version_), "asking for the driver's version");
    check(table_.cuDeviceGetCount(&devices_), "counting the devices");
    if (devices_ == 0) {
        throw Failure("the CUDA driver " + path + " sees no device; look at CUDA_VISIBLE_DEVICES and nvidia-smi");
    }
}

void Driver::fail(Outcome outcome, std::string_view attempt) const {
    const char* name = nullptr;
    const char* text = nullptr;
    table_.cuGetErrorName.pointer(outcome.result, &name);
    table_.cuGetErrorString.pointer(outcome.result, &text);
    throw Failure(std::string(attempt) + ": " + outcome.call + " failed with " +
                  (name != nullptr ? name : "an unknown error") + " (" + std::to_string(outcome.result) +
                  (text != nullptr ? std::string(": ") + text : "") + ")");
}

bool Driver::is_ours() const noexcept {
    return process_ == getpid();
}

void Driver::require_ours() const {
    if (!is_ours()) {
        throw Failure(FORKED);
    }
}

Probe probe() {
    try {
        const Driver& driver = Driver::open();
        return {true, "", driver.version(), driver.devices()};
    } catch (const Failure& failure) {
        return {false, failure.what(), 0, 0};
    }
}

}  // namespace ftrain::cuda

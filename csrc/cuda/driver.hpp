// The CUDA driver of this process, loaded when it is first asked for.
#pragma once

#include <sys/types.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "table.hpp"

namespace ftrain::cuda {

// A call of the driver (or of NVRTC) failed, or there is no driver. The text names the attempt, the call and the result.
class Failure : public std::runtime_error {
public:
    explicit Failure(const std::string& text) : std::runtime_error(text) {}
};

struct Probe {
    bool usable;
    std::string reason;  // why not; empty where it is
    int driver_version;  // 13000 is 13.0; 0 where unknown
    int devices;
};

class Driver {
public:
    // The driver, initialized, with at least one device: the library that FTRAIN_LIBCUDA names, or libcuda.so.1.
    // It stays loaded for as long as the process lives. Throws Failure with the reason why there is none.
    static const Driver& open();

    const Table& call() const noexcept { return table_; }
    int version() const noexcept { return version_; }
    int devices() const noexcept { return devices_; }

    // Throws Failure unless the call succeeded. `attempt` says what it was for: "making an event".
    void check(Outcome outcome, std::string_view attempt) const {
        if (outcome.result != SUCCESS) {
            fail(outcome, attempt);
        }
    }
    [[noreturn]] void fail(Outcome outcome, std::string_view attempt) const;

    // False in a child forked from the process that loaded it: there no call may be made any more.
    bool is_ours() const noexcept;
    void require_ours() const;

private:
    Driver(void* library, const std::string& path);

    Table table_;
    pid_t process_;
    int version_ = 0;
    int devices_ = 0;
};

// Whether there is a GPU to use, and why not. Throws nothing but for want of memory.
Probe probe();

}  // namespace ftrain::cuda

// Host memory that the device reads and writes by itself: registered with the driver once, kept until it is given back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "context.hpp"

namespace ftrain::cuda {

class Pin {
public:
    // Where the driver refuses to pin, the pin is there all the same, is not pinned() and has a reason(): copies work
    // without, but the host waits for them. Throws Failure where the driver itself is broken. The context is current.
    // Pins of the same range share its registration, which ends with the last of them.
    Pin(std::shared_ptr<Context> context, std::uintptr_t address, std::size_t nbytes);
    ~Pin() { give_back(); }
    Pin(const Pin&) = delete;
    Pin& operator=(const Pin&) = delete;

    bool pinned() const noexcept { return pinned_; }
    const std::string& reason() const noexcept { return reason_; }

    bool covers(std::uintptr_t address, std::size_t nbytes) const noexcept {
        return pinned_ && address >= address_ && nbytes <= nbytes_ && address - address_ <= nbytes_ - nbytes;
    }
    // Where the device sees the byte at `address`, which is in the range.
    DeviceAddress seen_at(std::uintptr_t address) const noexcept { return seen_at_ + (address - address_); }

    // Nothing may be in flight on the range any more.
    void give_back() noexcept;

private:
    void find_seen_address();

    std::shared_ptr<Context> context_;
    std::uintptr_t address_;
    std::size_t nbytes_;
    bool pinned_ = false;
    std::string reason_;
    DeviceAddress seen_at_ = 0;
};

}  // namespace ftrain::cuda

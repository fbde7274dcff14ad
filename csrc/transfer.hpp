// Reads and writes that are in flight while something else is done: io_uring, or threads where the kernel refuses that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace ftrain {

struct Transfer {
    bool writes;
    int fd;
    std::uintptr_t address;
    std::size_t nbytes;
    std::uint64_t offset;
};

constexpr unsigned DEPTH_MAX = 4096;

enum class TransferBackend { any, uring, threads };

// Used by one thread. A transfer is complete when `wait` names it: short ones are continued, interrupted ones repeated.
class TransferQueue {
public:
    // Room for `depth` transfers in flight, 1 to DEPTH_MAX, or std::invalid_argument. Throws SystemFailure where `uring` was
    // asked for and is refused.
    static std::unique_ptr<TransferQueue> make(unsigned depth, TransferBackend backend);

    // Waits for what is in flight: the kernel writes to that memory until it is done.
    virtual ~TransferQueue() = default;
    TransferQueue(const TransferQueue&) = delete;
    TransferQueue& operator=(const TransferQueue&) = delete;

    // Begins a transfer under the name `slot`, below depth and not in use. Its memory must outlive it.
    virtual void submit(unsigned slot, const Transfer& transfer) = 0;

    // The slot of a transfer that is complete. Throws what became of one: SystemFailure, or ShortFile.
    virtual unsigned wait() = 0;

    unsigned in_flight() const noexcept { return in_flight_; }
    virtual const char* name() const noexcept = 0;

protected:
    TransferQueue() = default;
    unsigned in_flight_ = 0;
};

}  // namespace ftrain

// Copies between the host's memory and one device's, worked out once, to be made any number of times.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "stager.hpp"
#include "tiles.hpp"

namespace ftrain::cuda {

struct HostDeviceCopy {
    std::uintptr_t host;
    DeviceAddress device;
    std::size_t nbytes;
};

enum class Direction { TO_HOST, TO_DEVICE };

class Ticket;

class Plan : public std::enable_shared_from_this<Plan> {
public:
    // Small copies in pinned memory go by kernel or in the driver's batch, the rest one by one. No destination may
    // overlap another range. Which memory is pinned is looked up here: pin first.
    Plan(std::shared_ptr<Stager> stager, std::span<const HostDeviceCopy> copies, Direction direction);
    ~Plan();
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    // Starts the copies, after what is on `compute` now. To the device, what comes to `compute` later runs after them.
    // Allocates nothing in the steady state. std::invalid_argument where pinned memory was given back meanwhile.
    // The host waits only where memory is not pinned.
    std::unique_ptr<Ticket> begin(StreamHandle compute);

    std::size_t nbytes() const noexcept { return nbytes_; }
    Stager& stager() const noexcept { return *stager_; }

private:
    struct Batch {
        std::vector<DeviceAddress> to, from;
        std::vector<std::size_t> nbytes;
    };

    void add(const HostDeviceCopy& copy);
    void add_tiles(const HostDeviceCopy& copy, DeviceAddress seen);
    void upload_tiles();
    void enqueue();
    void enqueue_batch();
    void require_pins() const;

    std::shared_ptr<Stager> stager_;
    Direction direction_;
    std::size_t nbytes_ = 0;
    std::vector<HostDeviceCopy> singles_;
    Batch batch_;
    std::vector<Tile> tiles_;                      // until they are in the scratch
    std::uint64_t tile_count_ = 0;
    std::unique_ptr<Scratch> scratch_;             // the tiles, on the device
    std::unique_ptr<Event> uploaded_;              // reached once the tiles are there
    std::vector<std::shared_ptr<const Pin>> pins_;  // what the kernel and the batch rely on
};

// Copies that were begun. Dropped, it waits for them: none outlives the memory that the caller frees next.
class Ticket {
public:
    Ticket(std::shared_ptr<Plan> plan, std::unique_ptr<Event> finished)
        : plan_(std::move(plan)), finished_(std::move(finished)) {}
    ~Ticket();
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;

    // What comes to the stream from now on waits for the copies, on the device.
    void order(StreamHandle later) const;
    bool done() const;
    void wait() const;

private:
    std::shared_ptr<Plan> plan_;
    std::unique_ptr<Event> finished_;
};

}  // namespace ftrain::cuda

#include "scratch.hpp"

#include <algorithm>
#include <bit>
#include <string>

namespace ftrain::cuda {

HostMemory::HostMemory(const Context& context, std::size_t nbytes) : context_(context) {
    const Outcome outcome = context.call().cuMemHostAlloc(&data_, nbytes, HOST_PORTABLE | HOST_DEVICE_MAP);
    if (outcome.result != SUCCESS) {
        context.fail(outcome, "allocating " + std::to_string(nbytes) + " bytes of pinned memory for use");
    }
}

HostMemory::~HostMemory() {
    quietly(context_, [this](const Table& call) { call.cuMemFreeHost(data_); });
}

DeviceMemory::DeviceMemory(const Context& context, std::size_t nbytes) : context_(context) {
    const Outcome outcome = context.call().cuMemAlloc_v2(&address_, nbytes);
    if (outcome.result != SUCCESS) {
        context.fail(outcome, "allocating " + std::to_string(nbytes) + " bytes of memory");
    }
}

DeviceMemory::~DeviceMemory() {
    quietly(context_, [this](const Table& call) { call.cuMemFree_v2(address_); });
}

std::unique_ptr<Scratch> ScratchPool::take(std::size_t nbytes) {
    {
        const std::lock_guard lock(mutex_);
        const auto fits = [nbytes](const auto& scratch) { return scratch->nbytes() >= nbytes; };
        const auto found = std::find_if(free_.begin(), free_.end(), fits);
        if (found != free_.end()) {
            std::unique_ptr<Scratch> scratch = std::move(*found);
            free_.erase(found);
            return scratch;
        }
        free_.reserve(KEPT_MAX);
    }
    // Rounded up, so that plans of about one size share it.
    return std::make_unique<Scratch>(context_, std::bit_ceil(std::max(nbytes, NBYTES_MIN)));
}

void ScratchPool::give(std::unique_ptr<Scratch> scratch) noexcept {
    const std::lock_guard lock(mutex_);
    if (scratch && free_.size() < KEPT_MAX) {
        free_.push_back(std::move(scratch));
    }
}

}  // namespace ftrain::cuda

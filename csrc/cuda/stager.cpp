#include "stager.hpp"

#include <algorithm>

namespace ftrain::cuda {

Stager::Stager(int device, std::vector<std::string> nvrtc_libraries)
    : context_(std::make_shared<Context>(Driver::open(), device)),
      nvrtc_libraries_(std::move(nvrtc_libraries)),
      scratch_(*context_),
      events_(*context_),
      making_(std::in_place, *context_),
      stream_(*context_),
      compute_mark_(*context_) {
    making_.reset();
}

std::shared_ptr<Pin> Stager::pin(std::uintptr_t address, std::size_t nbytes) {
    const Current current(*context_);
    auto made = std::make_shared<Pin>(context_, address, nbytes);
    const std::lock_guard lock(mutex_);
    std::erase_if(pins_, [](const auto& pin) { return pin.expired(); });
    pins_.push_back(made);
    return made;
}

void Stager::unpin(Pin& pin) noexcept {
    const std::lock_guard lock(mutex_);
    if (pin.pinned()) {
        stream_.wait_quietly();
        pin.give_back();
    }
}

std::shared_ptr<const Pin> Stager::pin_over(std::uintptr_t address, std::size_t nbytes) const {
    for (const std::weak_ptr<Pin>& known : pins_) {
        const std::shared_ptr<const Pin> pin = known.lock();
        if (pin && pin->covers(address, nbytes)) {
            return pin;
        }
    }
    return nullptr;
}

const Kernels* Stager::kernels() {
    if (!kernels_ && no_kernels_.empty()) {
        try {
            kernels_.emplace(*context_, nvrtc_libraries_);
        } catch (const Failure& failure) {
            no_kernels_ = failure.what();
        }
    }
    return kernels_ ? &*kernels_ : nullptr;
}

SmallCopies Stager::small_copies() {
    if (kernels() != nullptr) {
        return SmallCopies::KERNEL;
    }
    const Table& call = context_->call();
    return call.cuMemcpyBatchAsync || call.cuMemcpyBatchAsync_v2 ? SmallCopies::BATCH : SmallCopies::SINGLE;
}

void Stager::order_after(StreamHandle compute) {
    // The one event serves all: a stream that waits for it waits for the mark that it had when the wait was asked for.
    compute_mark_.record(compute);
    compute_mark_.order(stream_.handle());
}

}  // namespace ftrain::cuda

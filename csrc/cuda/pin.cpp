#include "pin.hpp"

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

namespace ftrain::cuda {

namespace {

// The ranges that are registered, with how many pins each has and whether it is ours to unregister.
class Registry {
public:
    // The driver's answer; SUCCESS where the range had been registered here before.
    Outcome add(const Context& context, std::uintptr_t address, std::size_t nbytes) {
        const std::lock_guard lock(mutex_);
        Entry& entry = entries_[{&context.driver(), address, nbytes}];
        Outcome outcome{context.call().cuMemHostRegister_v2.name, SUCCESS};
        if (entry.pins == 0) {
            outcome = context.call().cuMemHostRegister_v2(reinterpret_cast<void*>(address), nbytes,
                                                          HOST_PORTABLE | HOST_DEVICE_MAP);
            entry.is_ours = outcome.result == SUCCESS;
        }
        if (outcome.result == SUCCESS || outcome.result == ALREADY_REGISTERED) {
            ++entry.pins;
            return {outcome.call, SUCCESS};
        }
        entries_.erase({&context.driver(), address, nbytes});
        return outcome;
    }

    void remove(const Context& context, std::uintptr_t address, std::size_t nbytes) noexcept {
        const std::lock_guard lock(mutex_);
        const auto found = entries_.find({&context.driver(), address, nbytes});
        if (--found->second.pins != 0) {
            return;
        }
        if (found->second.is_ours) {
            quietly(context, [address](const Table& call) {
                call.cuMemHostUnregister(reinterpret_cast<void*>(address));
            });
        }
        entries_.erase(found);
    }

private:
    struct Entry {
        unsigned pins = 0;
        bool is_ours = false;
    };

    std::mutex mutex_;
    std::map<std::tuple<const Driver*, std::uintptr_t, std::size_t>, Entry> entries_;
};

Registry& registry() {
    static Registry& all = *new Registry;  // never destroyed: pins may be given back as the process ends
    return all;
}

bool is_refusal(Result result) {
    return result == INVALID_VALUE || result == OUT_OF_MEMORY || result == OPERATING_SYSTEM ||
           result == NOT_PERMITTED || result == NOT_SUPPORTED;
}

}  // namespace

Pin::Pin(std::shared_ptr<Context> context, std::uintptr_t address, std::size_t nbytes)
    : context_(std::move(context)), address_(address), nbytes_(nbytes) {
    if (address == 0 || nbytes == 0) {
        throw std::invalid_argument("only memory can be pinned, not a null address or nothing");
    }
    const Outcome outcome = registry().add(*context_, address, nbytes);
    if (outcome.result == SUCCESS) {
        pinned_ = true;
        find_seen_address();
        return;
    }
    try {
        context_->fail(outcome, "pinning " + std::to_string(nbytes) + " bytes of memory for use");
    } catch (const Failure& failure) {
        if (!is_refusal(outcome.result)) {
            throw;
        }
        reason_ = std::string(failure.what()) +
                  "; copies go on through pageable memory and are slower: raise the locked-memory limit (ulimit -l)";
    }
}

void Pin::find_seen_address() {
    DeviceAddress last = 0;
    const auto look = [this](std::uintptr_t address, DeviceAddress& seen) {
        return context_->call().cuMemHostGetDevicePointer_v2(&seen, reinterpret_cast<void*>(address), 0);
    };
    Outcome outcome = look(address_, seen_at_);
    if (outcome.result == SUCCESS) {
        outcome = look(address_ + nbytes_ - 1, last);
    }
    if (outcome.result == SUCCESS && last - seen_at_ == nbytes_ - 1) {
        return;
    }
    give_back();
    if (outcome.result == SUCCESS || outcome.result == INVALID_VALUE) {
        throw Failure("parts of the memory to be pinned were pinned before by somebody else, in pieces: give those back");
    }
    context_->fail(outcome, "asking where pinned memory is seen");
}

void Pin::give_back() noexcept {
    if (pinned_) {
        pinned_ = false;
        registry().remove(*context_, address_, nbytes_);
    }
}

}  // namespace ftrain::cuda

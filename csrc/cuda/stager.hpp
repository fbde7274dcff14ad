// One device's copies: its context, the stream they run on, the memory they go through, and the kernels for small ones.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "context.hpp"
#include "kernels.hpp"
#include "pin.hpp"
#include "scratch.hpp"
#include "stream.hpp"

namespace ftrain::cuda {

// How small copies are made here: by a kernel of ours, in the driver's batches, or one by one.
enum class SmallCopies { KERNEL, BATCH, SINGLE };

// Shared by the plans, tickets and pins made of it: the last of them to go ends it.
class Stager {
public:
    Stager(int device, std::vector<std::string> nvrtc_libraries);

    const Context& context() const noexcept { return *context_; }
    const Stream& stream() const noexcept { return stream_; }
    EventPool& events() noexcept { return events_; }
    ScratchPool& scratch() noexcept { return scratch_; }

    // Held by who puts work on the stream, looks pins up, or takes one away.
    std::mutex& mutex() noexcept { return mutex_; }

    // Keeps the range pinned until the pin is given back with `unpin`, which first waits for all copies in flight.
    std::shared_ptr<Pin> pin(std::uintptr_t address, std::size_t nbytes);
    void unpin(Pin& pin) noexcept;

    // These under the mutex, the context current. kernels() compiles them the first time; null, for good, where that
    // fails, and no_kernels() says why.
    std::shared_ptr<const Pin> pin_over(std::uintptr_t address, std::size_t nbytes) const;
    const Kernels* kernels();
    const std::string& no_kernels() const noexcept { return no_kernels_; }
    SmallCopies small_copies();

    // What comes to the copy stream from now on runs after what is on `compute` now. Under the mutex.
    void order_after(StreamHandle compute);

private:
    std::shared_ptr<Context> context_;
    std::vector<std::string> nvrtc_libraries_;
    std::mutex mutex_;
    std::vector<std::weak_ptr<Pin>> pins_;
    std::string no_kernels_;
    std::optional<Kernels> kernels_;
    ScratchPool scratch_;
    EventPool events_;
    std::optional<Current> making_;  // current while the members below are made
    Stream stream_;
    Event compute_mark_;
};

}  // namespace ftrain::cuda

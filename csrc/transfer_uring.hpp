// TransferQueue over io_uring, by its system calls alone: no liburing. Source: io_uring(7), io_uring_setup(2), io_uring_enter(2).
#pragma once

#include <memory>

#include "transfer.hpp"

namespace ftrain {

// Throws SystemFailure where the kernel has no io_uring, lacks its read and write, or refuses it.
std::unique_ptr<TransferQueue> make_uring_queue(unsigned depth);

}  // namespace ftrain

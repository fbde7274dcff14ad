// TransferQueue by blocking calls in threads, for kernels and containers without io_uring.
#pragma once

#include <memory>

#include "transfer.hpp"

namespace ftrain {

std::unique_ptr<TransferQueue> make_thread_queue(unsigned depth);

}  // namespace ftrain

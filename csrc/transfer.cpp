#include "transfer.hpp"

#include <stdexcept>
#include <string>

#include "failure.hpp"
#include "transfer_threads.hpp"
#include "transfer_uring.hpp"

namespace ftrain {

std::unique_ptr<TransferQueue> TransferQueue::make(unsigned depth, TransferBackend backend) {
    if (depth == 0 || depth > DEPTH_MAX) {
        throw std::invalid_argument("depth must be 1 to " + std::to_string(DEPTH_MAX) + " transfers in flight");
    }
    if (backend != TransferBackend::threads) {
        try {
            return make_uring_queue(depth);
        } catch (const SystemFailure&) {
            // Containers often forbid it, and kernels before 5.6 lack what is needed.
            if (backend == TransferBackend::uring) {
                throw;
            }
        }
    }
    return make_thread_queue(depth);
}

}  // namespace ftrain

// Copies between addresses of this process, on as many threads as they are worth.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace ftrain {

struct Copy {
    std::uintptr_t to;
    std::uintptr_t from;
    std::size_t nbytes;
};

// Does all copies and returns when they are done. Each copy's two ranges, and all destinations, must be disjoint.
void copy_batch(std::span<const Copy> copies, unsigned threads);

}  // namespace ftrain

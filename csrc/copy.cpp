#include "copy.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

namespace ftrain {

namespace {

// Starting a thread costs about what copying this much does.
constexpr std::size_t THREAD_BYTES_MIN = std::size_t{1} << 20;

// The part of the batch that lies in bytes [begin, end) of all its bytes laid in a row.
void copy_range(std::span<const Copy> copies, std::size_t begin, std::size_t end) {
    std::size_t start = 0;
    for (const Copy& copy : copies) {
        const std::size_t stop = start + copy.nbytes;
        const std::size_t first = std::max(start, begin);
        const std::size_t last = std::min(stop, end);
        if (first < last) {
            std::memcpy(reinterpret_cast<void*>(copy.to + (first - start)),
                        reinterpret_cast<const void*>(copy.from + (first - start)), last - first);
        }
        start = stop;
    }
}

}  // namespace

void copy_batch(std::span<const Copy> copies, unsigned threads) {
    if (threads == 0) {
        throw std::invalid_argument("copy_batch needs at least one thread");
    }
    std::size_t total = 0;
    for (const Copy& copy : copies) {
        if (copy.nbytes != 0 && (copy.to == 0 || copy.from == 0)) {
            throw std::invalid_argument("copy_batch was given a null address");
        }
        total += copy.nbytes;
    }
    const std::size_t shares = std::clamp<std::size_t>(total / THREAD_BYTES_MIN, 1, threads);
    const std::size_t share = ((total / shares) + 63) & ~std::size_t{63};  // no cache line is written by two threads
    std::vector<std::jthread> others;
    others.reserve(shares - 1);
    for (std::size_t i = 1; i < shares; ++i) {
        const std::size_t end = i + 1 == shares ? total : std::min(total, (i + 1) * share);
        others.emplace_back([=] { copy_range(copies, std::min(total, i * share), end); });
    }
    copy_range(copies, 0, shares == 1 ? total : std::min(total, share));
}

}  // namespace ftrain

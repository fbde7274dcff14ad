#include "sums.hpp"

#include <algorithm>

#include "crc32c.hpp"
#include "polynomial.hpp"
#include "stream.hpp"

namespace ftrain {

namespace {

// Read for its checksum, then again from the nearest cache to be copied.
constexpr std::size_t BLOCK_BYTES = std::size_t{16} << 10;

}  // namespace

std::uint32_t Joiner::join(std::uint32_t first, std::uint32_t second, std::uint64_t second_nbytes) {
    if (second_nbytes == 0) {
        return first;
    }
    Known& known = known_[(second_nbytes * 0x9E3779B97F4A7C15ULL) >> 58];
    if (known.nbytes != second_nbytes) {
        known = {second_nbytes, polynomial::x_to_the(8 * second_nbytes)};
    }
    return polynomial::multiply(first, known.factor) ^ second;
}

std::uint32_t copy_summed(void* to, const void* from, std::size_t nbytes) {
    auto* target = static_cast<std::byte*>(to);
    const auto* source = static_cast<const std::byte*>(from);
    std::uint32_t sum = 0;
    while (nbytes != 0) {
        const std::size_t n = std::min(nbytes, BLOCK_BYTES);
        sum = crc32c(source, n, sum);
        stream_copy(target, source, n);
        target += n;
        source += n;
        nbytes -= n;
    }
    return sum;
}

}  // namespace ftrain

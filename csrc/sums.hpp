// Checksums of ranges from checksums of their parts, so that every byte is read once for all ranges that it is in.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace ftrain {

// Joins checksums of adjacent ranges. Not for use by two threads at once: it remembers the lengths that it met.
class Joiner {
public:
    // crc32c(a + b), from crc32c(a), crc32c(b) and the length of b.
    std::uint32_t join(std::uint32_t first, std::uint32_t second, std::uint64_t second_nbytes);

private:
    struct Known {
        std::uint64_t nbytes = ~std::uint64_t{0};
        std::uint32_t factor = 0;
    };
    std::array<Known, 64> known_{};
};

// Copies and gives the checksum of what was copied, in one pass over the memory.
std::uint32_t copy_summed(void* to, const void* from, std::size_t nbytes);

}  // namespace ftrain

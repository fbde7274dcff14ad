// CRC-32C (Castagnoli, RFC 3720 appendix B.4): the checksum of every chunk and box that ftrain writes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ftrain {

// The checksum of the bytes whose checksum is `value` followed by these: crc32c(b, crc32c(a)) == crc32c(a + b).
std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t value);

// The same by tables, as on a CPU without instructions for it.
std::uint32_t crc32c_software(const void* data, std::size_t nbytes, std::uint32_t value);

// How crc32c computes on this CPU: "sse4.2", "armv8" or "software".
const char* crc32c_backend();

}  // namespace ftrain

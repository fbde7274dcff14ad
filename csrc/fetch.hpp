// Reads many ranges of a few files into memory, many at a time, and proves each by its checksum on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "crew.hpp"
#include "transfer.hpp"

namespace ftrain {

struct File {
    int fd;
    bool direct;  // O_DIRECT: read in whole pages through buffers. Otherwise through the page cache, straight to its place.
    std::uintptr_t memory = 0;  // where its bytes are in this process, instead of behind a descriptor
};

// `nbytes` at `offset` of a file, to `address` (0: only to be proved), whose checksum is to be `sum`.
struct Wanted {
    std::uint32_t file;
    std::uint32_t sum;
    std::uint64_t offset;
    std::uint64_t nbytes;
    std::uintptr_t address;
};

struct FetchOptions {
    unsigned depth = 8;  // transfers in flight in each thread
    std::size_t block_bytes = std::size_t{2} << 20;
    CrewOptions crew{.threads = 2};
    TransferBackend backend = TransferBackend::any;
};

// The places in `wanted` whose bytes do not match their checksum. Throws SystemFailure, or ShortFile where a file ends early.
// A direct file must hold whole pages. Destinations must be disjoint; the ranges in the files need not.
std::vector<std::size_t> fetch(std::span<const File> files, std::span<const Wanted> wanted, const FetchOptions& options,
                               const OnIdle& on_idle);

// How much of the file is in the page cache: 0 to 1, 0 where the kernel does not say.
double cached_share(int fd);

}  // namespace ftrain

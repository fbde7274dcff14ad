// A 64-bit digest of memory, to see whether two replicas hold the same bytes. Not for adversaries.
//
// Of the n bytes as little-endian 8-byte words w[0], w[1], … (the last filled up with zeros), modulo 2^64:
//
//     mixed(n * G + sum over i of mixed(w[i] + (i + 1) * G)),  G = 0x9E3779B97F4A7C15, mixed = SplitMix64's finalizer
//
// A sum may be taken in any order, by any number of threads; the index under the mix makes exchanged words show.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "stager.hpp"

namespace ftrain::cuda {

struct DeviceRange {
    DeviceAddress address;
    std::size_t nbytes;
};

// Of each range, after what is on `compute` now; what comes to `compute` later may change them. Waits for the result.
// Throws Failure where the kernels cannot be had.
std::vector<std::uint64_t> digest_of_device(Stager& stager, std::span<const DeviceRange> ranges, StreamHandle compute);

// The same, of host memory.
std::uint64_t digest_of_host(const void* data, std::size_t nbytes) noexcept;

}  // namespace ftrain::cuda

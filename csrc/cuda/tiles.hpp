// The tables that kernels.cu reads, as it declares them.
#pragma once

#include <cstdint>

namespace ftrain::cuda {

constexpr std::uint64_t TILE_BYTES_MAX = 16 << 10;  // one block's portion: small enough to share tensors out evenly
constexpr std::uint64_t DIGEST_TILE_BYTES_MAX = 64 << 10;

struct Tile {
    std::uint64_t to;
    std::uint64_t from;
    std::uint64_t nbytes;
};

struct DigestTile {
    std::uint64_t from;
    std::uint64_t nbytes;
    std::uint64_t word;
    std::uint64_t range;
};

}  // namespace ftrain::cuda

#include "kernels.hpp"

#include <algorithm>
#include <cstring>

namespace standin::gpu {

struct Dimensions {
    unsigned x, y, z;
};
thread_local Dimensions blockIdx, threadIdx, blockDim, gridDim;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

template <class T>
void atomicAdd(T* to, T amount) {
    *to += amount;
}

#define __global__
#define __device__
#include KERNELS
#undef __global__
#undef __device__

template <class Kernel>
void run(unsigned blocks, unsigned threads, Kernel&& kernel) {
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    for (unsigned block = 0; block < blocks; ++block) {
        for (unsigned thread = 0; thread < threads; ++thread) {
            blockIdx = {block, 0, 0};
            threadIdx = {thread, 0, 0};
            kernel();
        }
    }
}

}  // namespace standin::gpu

namespace standin {

namespace {

using gpu::DigestTile;
using gpu::Tile;
using gpu::u64;

void violated(const char* what) {
    machine().violations.push_back(std::string("a kernel was given ") + what);
}

template <class T>
std::vector<T> table_at(Address address, u64 count) {
    const char* bytes = machine().device_bytes(address, count * sizeof(T));
    std::vector<T> table;
    if (bytes == nullptr) {
        violated("a table that is not in device memory");
    } else {
        table.resize(count);
        std::memcpy(table.data(), bytes, count * sizeof(T));
    }
    return table;
}

// The same tile in the host's addresses.
bool translate(Tile& tile) {
    char* to = machine().seen_bytes(tile.to, tile.nbytes);
    const char* from = machine().seen_bytes(tile.from, tile.nbytes);
    tile.to = reinterpret_cast<u64>(to);
    tile.from = reinterpret_cast<u64>(from);
    return to != nullptr && from != nullptr;
}

Operation copy_operation(bool gather, unsigned blocks, unsigned threads, Address table, u64 count) {
    // In portions, shuffled, each an operation's step: blocks run in any order, with other streams' work between.
    struct Progress {
        bool begun = false;
        std::vector<Tile> left;
    };
    auto progress = std::make_shared<Progress>();
    Operation operation;
    operation.ready = [] { return true; };
    operation.step = [=] {
        Machine& m = machine();
        if (!progress->begun) {
            progress->begun = true;
            progress->left = table_at<Tile>(table, count);
            std::shuffle(progress->left.begin(), progress->left.end(), m.random);
        }
        std::vector<Tile>& left = progress->left;
        const std::size_t portion = std::min(left.size(), 1 + m.below(left.size()));
        std::vector<Tile> tiles(left.end() - static_cast<std::ptrdiff_t>(portion), left.end());
        left.resize(left.size() - portion);
        std::erase_if(tiles, [](Tile& tile) {
            const bool good = translate(tile);
            if (!good) {
                violated("an address outside of what is allocated, registered and still there");
            }
            return !good;
        });
        gpu::run(blocks, threads, [&] {
            gather ? gpu::ftrain_gather(tiles.data(), tiles.size()) : gpu::ftrain_scatter(tiles.data(), tiles.size());
        });
        return left.empty();
    };
    return operation;
}

Operation digest_operation(unsigned blocks, unsigned threads, Address table, u64 count, Address sums_address) {
    Operation operation;
    operation.ready = [] { return true; };
    operation.step = [=] {
        std::vector<DigestTile> tiles = table_at<DigestTile>(table, count);
        u64 ranges = 0;
        for (DigestTile& tile : tiles) {
            ranges = std::max(ranges, tile.range + 1);
            const char* from = machine().device_bytes(tile.from, tile.nbytes);
            if (from == nullptr) {
                violated("a range to take a digest of that is not in device memory");
                return true;
            }
            tile.from = reinterpret_cast<u64>(from);
        }
        auto* sums = reinterpret_cast<u64*>(machine().device_bytes(sums_address, ranges * sizeof(u64)));
        if (sums == nullptr) {
            violated("no place for its sums");
            return true;
        }
        gpu::run(blocks, threads, [&] { gpu::ftrain_digest(tiles.data(), tiles.size(), sums); });
        return true;
    };
    return operation;
}

}  // namespace

Operation kernel_operation(const std::string& name, unsigned blocks, unsigned threads, void** parameters) {
    const auto parameter = [&](int i) { return *static_cast<u64*>(parameters[i]); };
    Operation operation = name == "ftrain_digest"
                              ? digest_operation(blocks, threads, parameter(0), parameter(1), parameter(2))
                              : copy_operation(name == "ftrain_gather", blocks, threads, parameter(0), parameter(1));
    const std::size_t entry = name == "ftrain_digest" ? sizeof(DigestTile) : sizeof(Tile);
    const std::size_t nbytes = parameter(1) * entry;
    operation.touches.emplace_back(machine().device_bytes(parameter(0), nbytes), nbytes);
    return operation;
}

}  // namespace standin

// What ftrain runs on a GPU: the copies of many small tensors in one launch, and a digest to compare replicas by.
//
// Compiled at first use, for the device that is there, by NVRTC; so it includes nothing. No shared memory and no
// barrier: a thread's work depends on its index alone, and a test runs the same source on the CPU.

typedef unsigned long long u64;

struct Tile {
    u64 to;
    u64 from;
    u64 nbytes;
};

struct DigestTile {
    u64 from;
    u64 nbytes;  // a multiple of 8, but in the last tile of a range
    u64 word;    // index in its range of the tile's first 8-byte word
    u64 range;
};

template <class Word>
__device__ void copy_words(const Tile& tile, u64 offset, u64 words) {
    Word* to = reinterpret_cast<Word*>(tile.to + offset);
    const Word* from = reinterpret_cast<const Word*>(tile.from + offset);
    const u64 step = blockDim.x;
    u64 i = threadIdx.x;
    // Four loads before the first store: one side is across the bus, and its latency is what there is to hide.
    for (; i + 3 * step < words; i += 4 * step) {
        const Word a = from[i];
        const Word b = from[i + step];
        const Word c = from[i + 2 * step];
        const Word d = from[i + 3 * step];
        to[i] = a;
        to[i + step] = b;
        to[i + 2 * step] = c;
        to[i + 3 * step] = d;
    }
    for (; i < words; i += step) {
        to[i] = from[i];
    }
}

// Bytes up to the first place where both sides are aligned, then words, then the bytes that are left.
template <class Word>
__device__ void copy_aligned(const Tile& tile) {
    u64 head = (sizeof(Word) - tile.to % sizeof(Word)) % sizeof(Word);
    head = head < tile.nbytes ? head : tile.nbytes;
    const u64 words = (tile.nbytes - head) / sizeof(Word);
    const u64 body = words * sizeof(Word);
    copy_words<unsigned char>(tile, 0, head);
    copy_words<Word>(tile, head, words);
    copy_words<unsigned char>(tile, head + body, tile.nbytes - head - body);
}

__device__ void copy_tiles(const Tile* tiles, u64 count) {
    for (u64 i = blockIdx.x; i < count; i += gridDim.x) {
        const Tile tile = tiles[i];
        const u64 apart = tile.to - tile.from;
        if (apart % 16 == 0) {
            copy_aligned<uint4>(tile);
        } else if (apart % 8 == 0) {
            copy_aligned<u64>(tile);
        } else if (apart % 4 == 0) {
            copy_aligned<unsigned int>(tile);
        } else if (apart % 2 == 0) {
            copy_aligned<unsigned short>(tile);
        } else {
            copy_words<unsigned char>(tile, 0, tile.nbytes);
        }
    }
}

// Device to host and host to device: two names, so that a profile tells them apart.
extern "C" __global__ void ftrain_gather(const Tile* tiles, u64 count) {
    copy_tiles(tiles, count);
}

extern "C" __global__ void ftrain_scatter(const Tile* tiles, u64 count) {
    copy_tiles(tiles, count);
}

__device__ u64 mixed(u64 x) {  // the finalizer of SplitMix64 (Steele, Lea, Flood 2014)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

__device__ u64 word_at(u64 address, u64 nbytes) {
    if (nbytes >= 8 && address % 8 == 0) {
        return *reinterpret_cast<const u64*>(address);
    }
    u64 word = 0;
    for (u64 i = 0; i < 8 && i < nbytes; ++i) {
        word |= static_cast<u64>(reinterpret_cast<const unsigned char*>(address)[i]) << (8 * i);
    }
    return word;
}

// Adds to sums[range] what csrc/cuda/digest.hpp defines. A sum, so that it does not depend on who comes first.
extern "C" __global__ void ftrain_digest(const DigestTile* tiles, u64 count, u64* sums) {
    u64 sum = 0;
    u64 range = 0;
    for (u64 i = blockIdx.x; i < count; i += gridDim.x) {
        const DigestTile tile = tiles[i];
        if (tile.range != range && sum != 0) {
            atomicAdd(&sums[range], sum);
            sum = 0;
        }
        range = tile.range;
        for (u64 at = 8 * threadIdx.x; at < tile.nbytes; at += 8 * blockDim.x) {
            const u64 index = tile.word + at / 8;
            sum += mixed(word_at(tile.from + at, tile.nbytes - at) + (index + 1) * 0x9E3779B97F4A7C15ULL);
        }
    }
    if (sum != 0) {
        atomicAdd(&sums[range], sum);
    }
}

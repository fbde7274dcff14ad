#include "digest.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "tiles.hpp"

namespace ftrain::cuda {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

namespace {

constexpr std::uint64_t GOLDEN = 0x9E3779B97F4A7C15ULL;

constexpr std::uint64_t mixed(std::uint64_t x) noexcept {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

std::uint64_t finished(std::uint64_t sum, std::size_t nbytes) noexcept {
    return mixed(nbytes * GOLDEN + sum);
}

std::vector<DigestTile> tiles_of(std::span<const DeviceRange> ranges) {
    std::vector<DigestTile> tiles;
    for (std::size_t i = 0; i < ranges.size(); ++i) {
        const DeviceRange& range = ranges[i];
        if (range.nbytes != 0 && range.address == 0) {
            throw std::invalid_argument("a digest was given a null address");
        }
        for (std::size_t at = 0; at < range.nbytes; at += DIGEST_TILE_BYTES_MAX) {
            tiles.push_back({range.address + at, std::min<std::size_t>(DIGEST_TILE_BYTES_MAX, range.nbytes - at), at / 8, i});
        }
    }
    return tiles;
}

}  // namespace

std::vector<std::uint64_t> digest_of_device(Stager& stager, std::span<const DeviceRange> ranges, StreamHandle compute) {
    const std::vector<DigestTile> tiles = tiles_of(ranges);
    const std::size_t table_bytes = tiles.size() * sizeof(DigestTile);
    const std::size_t sums_bytes = ranges.size() * sizeof(std::uint64_t);
    std::vector<std::uint64_t> sums(ranges.size(), 0);
    if (!tiles.empty()) {
        const Context& context = stager.context();
        const Current current(context);
        const std::lock_guard lock(stager.mutex());
        const Kernels* kernels = stager.kernels();
        if (kernels == nullptr) {
            throw Failure("a digest of device memory needs kernels: " + stager.no_kernels());
        }
        const StreamHandle stream = stager.stream().handle();
        std::unique_ptr<Event> finished_mark = stager.events().take();
        std::unique_ptr<Scratch> scratch = stager.scratch().take(table_bytes + sums_bytes);
        std::memcpy(scratch->host<char>(), tiles.data(), table_bytes);
        std::memcpy(scratch->host<char>() + table_bytes, sums.data(), sums_bytes);
        const DeviceAddress sums_address = scratch->device() + table_bytes;
        try {
            stager.order_after(compute);
            context.check(context.call().cuMemcpyHtoDAsync_v2(scratch->device(), scratch->host<char>(),
                                                              table_bytes + sums_bytes, stream),
                          "uploading what to take a digest of");
            kernels->digest(scratch->device(), tiles.size(), sums_address, stream);
            context.check(context.call().cuMemcpyDtoHAsync_v2(scratch->host<char>() + table_bytes, sums_address,
                                                              sums_bytes, stream),
                          "fetching digests");
            finished_mark->record(stream);
            finished_mark->wait();
        } catch (...) {
            stager.stream().wait_quietly();  // before the scratch goes
            throw;
        }
        std::memcpy(sums.data(), scratch->host<char>() + table_bytes, sums_bytes);
        stager.events().give(std::move(finished_mark));
        stager.scratch().give(std::move(scratch));
    }
    for (std::size_t i = 0; i < ranges.size(); ++i) {
        sums[i] = finished(sums[i], ranges[i].nbytes);
    }
    return sums;
}

std::uint64_t digest_of_host(const void* data, std::size_t nbytes) noexcept {
    const auto* bytes = static_cast<const unsigned char*>(data);
    std::uint64_t sum = 0;
    for (std::size_t at = 0, index = 0; at < nbytes; at += 8, ++index) {
        std::uint64_t word = 0;
        std::memcpy(&word, bytes + at, std::min<std::size_t>(8, nbytes - at));
        sum += mixed(word + (index + 1) * GOLDEN);
    }
    return finished(sum, nbytes);
}

}  // namespace ftrain::cuda

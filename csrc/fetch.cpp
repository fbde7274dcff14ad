#include "fetch.hpp"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>

#include "crc32c.hpp"
#include "file.hpp"
#include "memory.hpp"
#include "sums.hpp"

namespace ftrain {

namespace {

constexpr std::uint64_t FILE_BYTES_MAX = std::uint64_t{1} << 62;
constexpr std::uint64_t GAP_BYTES_MAX = std::uint64_t{64} << 10;  // read over, where that spares a transfer
constexpr std::size_t CACHED_PIECE_BYTES = std::size_t{512} << 10;  // its checksum finds it in the cache

void go_on() {}

// Some bytes of one wanted range, at a place in a block.
struct Part {
    std::size_t wanted;
    std::uint64_t within;  // the wanted range
    std::uint64_t offset;  // in the file
    std::uint64_t nbytes;
    std::uint32_t sum;
};

struct Block {
    std::uint32_t file;
    std::uint64_t begin;  // whole pages
    std::uint64_t end;
    std::size_t first_part;
    std::size_t last_part;
};

struct Plan {
    std::vector<Block> blocks;
    std::vector<Part> parts;  // of all blocks in a row
};

std::uint64_t page_floor(std::uint64_t offset) {
    return offset / PAGE_BYTES * PAGE_BYTES;
}

// The byte `at` of a file may be read with the block. A range that overlaps the one before may begin ahead of its last block.
bool joins(const Block& block, std::uint32_t file, std::uint64_t at, std::size_t block_bytes) {
    return block.file == file && at >= block.begin && at <= block.end + GAP_BYTES_MAX && at < block.begin + block_bytes;
}

Plan make_plan(std::span<const Wanted> wanted, std::size_t block_bytes) {
    std::vector<std::size_t> order(wanted.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto place = [&](std::size_t i) { return std::pair(wanted[i].file, wanted[i].offset); };
    const auto comes_before = [&](std::size_t a, std::size_t b) { return place(a) < place(b); };
    if (!std::is_sorted(order.begin(), order.end(), comes_before)) {
        std::sort(order.begin(), order.end(), comes_before);
    }
    Plan plan;
    plan.parts.reserve(wanted.size());
    for (const std::size_t index : order) {
        const Wanted& one = wanted[index];
        for (std::uint64_t done = 0; done < one.nbytes;) {
            const std::uint64_t at = one.offset + done;
            if (plan.blocks.empty() || !joins(plan.blocks.back(), one.file, at, block_bytes)) {
                plan.blocks.push_back({one.file, page_floor(at), page_floor(at), plan.parts.size(), plan.parts.size()});
            }
            Block& block = plan.blocks.back();
            const std::uint64_t n = std::min(one.nbytes - done, block.begin + block_bytes - at);
            plan.parts.push_back({index, done, at, n, 0});
            block.end = std::max(block.end, page_floor(at + n + PAGE_BYTES - 1));
            block.last_part = plan.parts.size();
            done += n;
        }
    }
    return plan;
}

class Fetcher {
public:
    Fetcher(std::span<const File> files, std::span<const Wanted> wanted, const FetchOptions& options)
        : files_(files), wanted_(wanted), options_(options), plan_(make_plan(wanted, options.block_bytes)) {
        const bool any_direct = std::any_of(files.begin(), files.end(), [](const File& file) { return file.direct; });
        slots_ = any_direct ? options.depth : 0;
    }

    std::size_t blocks() const { return plan_.blocks.size(); }

    void work(const std::atomic<bool>& stop) {
        // One for each slot, and one that no transfer in flight knows.
        const Buffers buffers(slots_ + std::size_t{1}, options_.block_bytes);
        std::unique_ptr<TransferQueue> queue;
        std::vector<std::size_t> block_of(options_.depth);
        unsigned used = 0;
        const auto finish_one = [&] {
            const unsigned slot = queue->wait();
            take(plan_.blocks[block_of[slot]], buffers.at(slot));
            return slot;
        };
        while (!stop) {
            const std::size_t number = next_.fetch_add(1);
            if (number >= plan_.blocks.size()) {
                break;
            }
            const Block& block = plan_.blocks[number];
            if (files_[block.file].memory != 0) {
                take(block, reinterpret_cast<const std::byte*>(files_[block.file].memory + block.begin));
                continue;
            }
            if (!files_[block.file].direct) {
                read_cached(block, buffers.at(slots_), stop);
                continue;
            }
            if (!queue) {
                queue = TransferQueue::make(options_.depth, options_.backend);
            }
            const unsigned slot = used < options_.depth ? used++ : finish_one();
            block_of[slot] = number;
            const auto address = reinterpret_cast<std::uintptr_t>(buffers.at(slot));
            queue->submit(slot, {false, files_[block.file].fd, address, block.end - block.begin, block.begin});
        }
        while (queue && queue->in_flight() != 0 && !stop) {
            finish_one();
        }
    }

    std::vector<std::size_t> damaged() {
        std::vector<std::uint32_t> sums(wanted_.size(), 0);
        Joiner joiner;
        // The parts of a range stand in their order: it was cut from its beginning to its end.
        for (const Part& part : plan_.parts) {
            std::uint32_t& sum = sums[part.wanted];
            sum = part.within == 0 ? part.sum : joiner.join(sum, part.sum, part.nbytes);
        }
        std::vector<std::size_t> found;
        for (std::size_t i = 0; i < wanted_.size(); ++i) {
            if (sums[i] != wanted_[i].sum) {
                found.push_back(i);
            }
        }
        return found;
    }

private:
    void take(const Block& block, const std::byte* data) {
        for (std::size_t i = block.first_part; i < block.last_part; ++i) {
            Part& part = plan_.parts[i];
            const std::byte* from = data + (part.offset - block.begin);
            const std::uintptr_t to = wanted_[part.wanted].address;
            part.sum = to == 0 ? crc32c(from, part.nbytes, 0)
                               : copy_summed(reinterpret_cast<void*>(to + part.within), from, part.nbytes);
        }
    }

    void read_cached(const Block& block, std::byte* scratch, const std::atomic<bool>& stop) {
        for (std::size_t i = block.first_part; i < block.last_part && !stop; ++i) {
            Part& part = plan_.parts[i];
            const std::uintptr_t to = wanted_[part.wanted].address;
            for (std::uint64_t done = 0; done < part.nbytes;) {
                const std::size_t n = std::min<std::uint64_t>(part.nbytes - done, CACHED_PIECE_BYTES);
                void* place = to == 0 ? scratch : reinterpret_cast<void*>(to + part.within + done);
                read_into(files_[block.file].fd, reinterpret_cast<std::uintptr_t>(place), n, part.offset + done, go_on);
                part.sum = crc32c(place, n, part.sum);
                done += n;
            }
        }
    }

    std::span<const File> files_;
    std::span<const Wanted> wanted_;
    const FetchOptions& options_;
    Plan plan_;
    unsigned slots_;
    std::atomic<std::size_t> next_ = 0;
};

// cachestat(2), since Linux 6.5; its number is the same everywhere.
constexpr long SYS_CACHESTAT = 451;

struct CacheRange {
    std::uint64_t offset;
    std::uint64_t nbytes;
};

struct CacheState {
    std::uint64_t cached;
    std::uint64_t dirty;
    std::uint64_t writeback;
    std::uint64_t evicted;
    std::uint64_t recently_evicted;
};

}  // namespace

std::vector<std::size_t> fetch(std::span<const File> files, std::span<const Wanted> wanted, const FetchOptions& options,
                               const OnIdle& on_idle) {
    if (options.depth == 0 || options.crew.threads == 0 || options.block_bytes < CACHED_PIECE_BYTES ||
        options.block_bytes % PAGE_BYTES != 0) {
        throw std::invalid_argument("fetch needs threads, depth, and blocks of whole pages of at least 512 KiB");
    }
    for (const Wanted& one : wanted) {
        if (one.file >= files.size()) {
            throw std::invalid_argument("fetch: a range names a file that was not given");
        }
        if (one.nbytes > FILE_BYTES_MAX || one.offset > FILE_BYTES_MAX - one.nbytes) {
            throw std::invalid_argument("fetch: a range lies beyond what a file can hold");
        }
    }
    Fetcher fetcher(files, wanted, options);
    CrewOptions crew = options.crew;
    crew.threads = static_cast<unsigned>(std::clamp<std::size_t>(fetcher.blocks(), 1, crew.threads));
    run_crew(crew, [&](const std::atomic<bool>& stop) { fetcher.work(stop); }, on_idle);
    return fetcher.damaged();
}

double cached_share(int fd) {
    struct stat status {};
    if (fstat(fd, &status) != 0 || status.st_size <= 0) {
        return 0.0;
    }
    const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    CacheRange range{0, 0};
    CacheState state{};
    if (syscall(SYS_CACHESTAT, fd, &range, &state, 0) == 0) {
        return std::min(1.0, static_cast<double>(state.cached * page_bytes) / static_cast<double>(status.st_size));
    }
    const auto nbytes = static_cast<std::size_t>(status.st_size);
    std::vector<unsigned char> pages((nbytes + page_bytes - 1) / page_bytes);
    void* mapped = mmap(nullptr, nbytes, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
        return 0.0;
    }
    const bool told = mincore(mapped, nbytes, pages.data()) == 0;
    munmap(mapped, nbytes);
    const auto resident = std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1U) != 0; });
    return told ? static_cast<double>(resident) / static_cast<double>(pages.size()) : 0.0;
}

}  // namespace ftrain

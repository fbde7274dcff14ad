// Packs that are written by several threads and fetched again, whole and with every kind of interruption.
#include "pack.hpp"

#include <fcntl.h>
#include <sys/mman.h>

#include <atomic>
#include <stdexcept>

#include "check.hpp"
#include "crc32c.hpp"
#include "failure.hpp"
#include "fetch.hpp"
#include "memory.hpp"

using namespace ftrain;
using check::address_of;
using check::Bytes;
using check::TemporaryFile;

namespace {

constexpr std::uint64_t CHUNK_BYTES = 4 * PAGE_BYTES;
constexpr std::uint64_t CHUNKS = 40;
constexpr Geometry GEOMETRY{CHUNKS * CHUNK_BYTES, CHUNK_BYTES, CHUNKS * CHUNK_BYTES + PAGE_BYTES};
const std::string ENDING = "the end";

void nothing() {}

// Boxes of all kinds: empty, small, at the edges of chunks, over several of them; with gaps and without.
struct Example {
    Example() : memory(1, GEOMETRY.image_bytes), image(GEOMETRY.image_bytes) {
        constexpr std::uint64_t sizes[] = {0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 5, 0, 3 * CHUNK_BYTES + 1, 64, 0, PAGE_BYTES};
        constexpr std::uint64_t gaps[] = {0, 0, 63, 1, 4096, 20'000};
        std::uint64_t at = 0;
        for (std::size_t i = 0;; ++i) {
            const std::uint64_t nbytes = sizes[i % 10];
            at += gaps[i % 6];
            if (at + nbytes > GEOMETRY.payload_bytes) {
                break;
            }
            contents.push_back(check::bytes_of(nbytes, static_cast<std::uint32_t>(i)));
            std::copy(contents.back().begin(), contents.back().end(), image.begin() + static_cast<std::ptrdiff_t>(at));
            boxes.push_back({at, 0, nbytes});
            at += nbytes;
        }
        std::copy(image.begin(), image.end(), memory.at(0));
        for (std::size_t i = 0; i < ENDING.size(); ++i) {
            image[image.size() - ENDING.size() + i] = static_cast<std::byte>(ENDING[i]);
        }
    }

    Pack pack(bool in_place) const {
        std::vector<Box> placed = boxes;
        for (std::size_t i = 0; i < placed.size(); ++i) {
            placed[i].address = address_of(in_place ? memory.at(0) + placed[i].offset : contents[i].data());
        }
        return {placed, GEOMETRY, ENDING, in_place ? address_of(memory.at(0)) : 0};
    }

    std::vector<Wanted> wanted(const Sums& sums, Bytes& to) const {
        std::vector<Wanted> ranges;
        for (std::size_t i = 0; i < boxes.size(); ++i) {
            const std::uintptr_t address = i % 5 == 4 ? 0 : address_of(to.data()) + boxes[i].offset;
            ranges.push_back({static_cast<std::uint32_t>(i % 2), sums.boxes[i], boxes[i].offset, boxes[i].nbytes, address});
        }
        return ranges;
    }

    Buffers memory;
    Bytes image;
    std::vector<Bytes> contents;
    std::vector<Box> boxes;
};

bool make_direct(int fd) {
    return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_DIRECT) == 0;
}

void round_trip(const Example& example, TransferBackend backend, bool in_place, bool direct, unsigned threads) {
    const TemporaryFile file;
    if (direct && !make_direct(file.fd())) {
        return;
    }
    const WriteOptions options{.depth = 2, .bytes_per_second_max = 0, .crew = {.threads = threads}, .backend = backend};
    const Sums sums = example.pack(in_place).write(file.fd(), options, nothing);
    Bytes written(GEOMETRY.image_bytes);
    for (std::uint64_t chunk = 0; chunk < CHUNKS; ++chunk) {
        CHECK(sums.chunks[chunk] == crc32c(example.image.data() + chunk * CHUNK_BYTES, CHUNK_BYTES, 0));
    }
    for (std::size_t i = 0; i < example.boxes.size(); ++i) {
        CHECK(sums.boxes[i] == crc32c(example.contents[i].data(), example.contents[i].size(), 0));
    }
    const int cached = open(("/proc/self/fd/" + std::to_string(file.fd())).c_str(), O_RDONLY);
    CHECK(cached >= 0);
    CHECK(pread(cached, written.data(), written.size(), 0) == static_cast<ssize_t>(written.size()));
    CHECK(written == example.image);

    const std::vector<File> files{{file.fd(), direct}, {cached, false}};
    Bytes read(GEOMETRY.image_bytes);
    std::vector<Wanted> wanted = example.wanted(sums, read);
    FetchOptions fetching{.depth = 2, .block_bytes = std::size_t{512} << 10, .crew = {.threads = threads}, .backend = backend};
    CHECK(fetch(files, wanted, fetching, nothing).empty());
    for (const Wanted& one : wanted) {
        const auto begin = static_cast<std::ptrdiff_t>(one.offset);
        const auto end = static_cast<std::ptrdiff_t>(one.offset + one.nbytes);
        CHECK(one.address == 0 || std::equal(read.begin() + begin, read.begin() + end, example.image.begin() + begin));
    }
    wanted[3].sum ^= 1;
    wanted.back().sum ^= 1;
    CHECK((fetch(files, wanted, fetching, nothing) == std::vector<std::size_t>{3, wanted.size() - 1}));
    wanted[2].offset = GEOMETRY.image_bytes;
    CHECK_THROWS(ShortFile, fetch(files, wanted, fetching, nothing));
    close(cached);
}

void same_blocks_over_and_over_arrive(TransferBackend backend, bool direct) {
    constexpr std::size_t nbytes = std::size_t{3} << 20;
    const Bytes data = check::bytes_of(nbytes, 7);
    const TemporaryFile file;
    file.write(data);
    if (direct && !make_direct(file.fd())) {
        return;
    }
    const std::uint32_t sum = crc32c(data.data(), nbytes, 0);
    std::vector<Bytes> targets(5, Bytes(nbytes));
    std::vector<Wanted> wanted{{0, sum, 0, nbytes, 0}};
    for (Bytes& target : targets) {
        wanted.push_back({0, sum, 0, nbytes, address_of(target.data())});
    }
    const std::vector<File> files{{file.fd(), direct}};
    CHECK(fetch(files, wanted, {.depth = 1, .block_bytes = std::size_t{1} << 20, .backend = backend}, nothing).empty());
    for (const Bytes& target : targets) {
        CHECK(target == data);
    }
}

// What comes late finds its buffer still there: it would stay in the pipe otherwise.
void fetch_that_fails_frees_its_buffers_after_the_kernel() {
    const Bytes data = check::bytes_of(PAGE_BYTES, 8);
    check::LatePipe pipe(data);
    const std::vector<File> files{{pipe.read_end(), true}, {-1, true}};
    const std::vector<Wanted> wanted{{0, 0, 0, PAGE_BYTES, 0}, {1, 0, 0, PAGE_BYTES, 0}};
    CHECK_THROWS(SystemFailure, fetch(files, wanted, {.crew = {.threads = 1}, .backend = TransferBackend::uring}, nothing));
    CHECK(pipe.left_bytes() == 0);
}

void stop_in_the_middle_writes_nothing_more(const Example& example, TransferBackend backend, bool in_place) {
    const TemporaryFile file;
    const WriteOptions options{.depth = 3, .bytes_per_second_max = 1, .crew = {.threads = 3}, .backend = backend};
    int calls = 0;
    const auto on_idle = [&] {
        if (++calls == 2) {
            throw std::domain_error("enough");
        }
    };
    CHECK_THROWS(std::domain_error, example.pack(in_place).write(file.fd(), options, on_idle));
    Bytes written = file.bytes(GEOMETRY.image_bytes);
    const auto second = written.begin() + static_cast<std::ptrdiff_t>(CHUNK_BYTES);
    CHECK(std::all_of(second, written.end(), [](std::byte byte) { return byte == std::byte{0}; }));
}

void write_that_fails_frees_its_memory_after_the_kernel(const Example& example, TransferBackend backend, bool in_place) {
    const int fd = memfd_create("sealed", MFD_ALLOW_SEALING);
    CHECK(ftruncate(fd, static_cast<off_t>(GEOMETRY.image_bytes)) == 0);
    CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) == 0);
    const WriteOptions options{.depth = 4, .bytes_per_second_max = 0, .crew = {.threads = 3}, .backend = backend};
    CHECK_THROWS(SystemFailure, example.pack(in_place).write(fd, options, nothing));
    close(fd);
}

}  // namespace

int main() {
    const Example example;
    std::vector<TransferBackend> backends{TransferBackend::threads};
    if (std::string(TransferQueue::make(1, TransferBackend::any)->name()) == "io_uring") {
        backends.push_back(TransferBackend::uring);
        fetch_that_fails_frees_its_buffers_after_the_kernel();
    }
    for (const TransferBackend backend : backends) {
        for (const bool one : {true, false}) {
            for (const unsigned threads : {1U, 3U}) {
                round_trip(example, backend, one, true, threads);
                round_trip(example, backend, one, false, threads);
            }
            same_blocks_over_and_over_arrive(backend, one);
            stop_in_the_middle_writes_nothing_more(example, backend, one);
            write_that_fails_frees_its_memory_after_the_kernel(example, backend, one);
        }
    }
}

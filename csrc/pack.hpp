// A pack's image: the bytes of its file, of which the parts lie where they are until they are written. docs/format.md.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "crew.hpp"
#include "transfer.hpp"

namespace ftrain {

// One box: `nbytes` at `offset` of the image, to be found at `address`.
struct Box {
    std::uint64_t offset;
    std::uintptr_t address;
    std::uint64_t nbytes;
};

struct Geometry {
    std::uint64_t payload_bytes;  // chunks: a multiple of chunk_bytes
    std::uint64_t chunk_bytes;    // a multiple of PAGE_BYTES
    std::uint64_t image_bytes;    // of the whole file, a multiple of PAGE_BYTES
};

struct WriteOptions {
    unsigned depth = 8;  // transfers in flight in each thread
    std::uint64_t bytes_per_second_max = 0;
    double processors_max = 0;  // that each thread takes while others wait for them; 0: no bound
    CrewOptions crew;
    TransferBackend backend = TransferBackend::any;
};

struct Sums {
    std::vector<std::uint32_t> boxes;
    std::vector<std::uint32_t> chunks;
};

class Pack {
public:
    // `boxes` in order of their offsets and disjoint; zeros between them, `ending` as the last bytes. With `image`, the bytes
    // lie at that page-aligned address just as in the file (gaps zeroed, room for the ending) and are written from there;
    // without, through buffers. Throws std::invalid_argument where that does not fit together.
    Pack(std::vector<Box> boxes, const Geometry& geometry, std::string ending, std::uintptr_t image);

    // Writes all of it to `fd` from offset 0 and gives the checksums, computed on the way. Does not sync.
    Sums write(int fd, const WriteOptions& options, const OnIdle& on_idle) const;

    const Geometry& geometry() const noexcept { return geometry_; }

private:
    class Writer;
    void reserve(int fd, const OnIdle& on_idle) const;
    std::size_t chunks() const noexcept { return geometry_.payload_bytes / geometry_.chunk_bytes; }

    std::vector<Box> boxes_;
    std::vector<std::size_t> parts_;  // where the parts of each box begin among all parts: one for each chunk that it is in
    Geometry geometry_;
    std::string ending_;
    std::uintptr_t image_;
};

}  // namespace ftrain

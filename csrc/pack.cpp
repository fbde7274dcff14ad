#include "pack.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "courtesy.hpp"
#include "crc32c.hpp"
#include "failure.hpp"
#include "memory.hpp"
#include "sums.hpp"

namespace ftrain {

namespace {

constexpr std::uint64_t FILE_BYTES_MAX = std::uint64_t{1} << 62;

void check(bool holds, const char* problem) {
    if (!holds) {
        throw std::invalid_argument(std::string("pack: ") + problem);
    }
}

std::byte* pointer(std::uintptr_t address) {
    return reinterpret_cast<std::byte*>(address);
}

using Clock = std::chrono::steady_clock;

// Keeps the average rate since `begin` at its bound by sleeping, until told to stop.
void keep_rate(Clock::time_point begin, std::uint64_t done_bytes, std::uint64_t bytes_per_second_max,
               const std::atomic<bool>& stop) {
    if (bytes_per_second_max != 0) {
        sleep_until_due(begin, static_cast<double>(done_bytes) / static_cast<double>(bytes_per_second_max), stop);
    }
}

}  // namespace

Pack::Pack(std::vector<Box> boxes, const Geometry& geometry, std::string ending, std::uintptr_t image)
    : boxes_(std::move(boxes)), geometry_(geometry), ending_(std::move(ending)), image_(image) {
    const auto& [payload, chunk, whole] = geometry_;
    check(chunk != 0 && chunk % PAGE_BYTES == 0 && whole % PAGE_BYTES == 0, "chunks and image must be whole pages");
    check(payload % chunk == 0 && payload <= whole, "the payload must be whole chunks of the image");
    check(ending_.size() <= whole - payload, "there is no room for the ending");
    check(image_ % PAGE_BYTES == 0, "the image must begin with a page");
    check(whole <= FILE_BYTES_MAX, "the image is larger than a file can be");
    parts_.reserve(boxes_.size() + 1);
    std::size_t parts = 0;
    std::uint64_t end = 0;
    for (const Box& box : boxes_) {
        check(box.offset >= end && box.nbytes <= payload && box.offset <= payload - box.nbytes, "boxes overlap or reach beyond");
        check(box.nbytes == 0 || box.address != 0, "a box has a null address");
        end = box.offset + box.nbytes;
        parts_.push_back(parts);
        if (box.nbytes != 0) {
            parts += (end - 1) / chunk - box.offset / chunk + 1;
        }
    }
    parts_.push_back(parts);
}

// What the threads of one `write` share, and what each of them does.
class Pack::Writer {
public:
    Writer(const Pack& pack, int fd, const WriteOptions& options)
        : pack_(pack), fd_(fd), options_(options), parts_(pack.parts_.back()), chunks_(pack.chunks()) {}

    void work(const std::atomic<bool>& stop) {
        const Geometry& geometry = pack_.geometry_;
        const Buffers buffers(pack_.image_ == 0 ? options_.depth : 0, block_bytes());
        const Buffers last(1, ending_bytes());
        const std::unique_ptr<TransferQueue> queue = TransferQueue::make(options_.depth, options_.backend);
        Joiner joiner;
        Courtesy courtesy(options_.processors_max);
        unsigned used = 0;
        const auto slot = [&] { return used < options_.depth ? used++ : queue->wait(); };
        while (!stop) {
            const std::size_t chunk = next_.fetch_add(1);
            const std::uint64_t offset = chunk * geometry.chunk_bytes;
            if (chunk > pack_.chunks()) {
                break;
            }
            keep_rate(begin_, offset, options_.bytes_per_second_max, stop);
            courtesy.pause(stop);
            if (stop) {
                break;
            }
            if (chunk == pack_.chunks()) {
                if (ending_bytes() != 0) {
                    fill_ending(last.at(0));
                    queue->submit(slot(), {true, fd_, address_of(last.at(0)), ending_bytes(), offset});
                }
                break;
            }
            if (pack_.image_ != 0) {
                // The checksum first: it brings nothing into the cache that the transfer would have to wait for.
                sum_chunk(chunk, pointer(pack_.image_ + offset), false, joiner);
                queue->submit(slot(), {true, fd_, pack_.image_ + offset, geometry.chunk_bytes, offset});
            } else {
                const unsigned free = slot();
                sum_chunk(chunk, buffers.at(free), true, joiner);
                queue->submit(free, {true, fd_, address_of(buffers.at(free)), geometry.chunk_bytes, offset});
            }
        }
        while (queue->in_flight() != 0 && !stop) {
            queue->wait();
        }
    }

    Sums sums() {
        Joiner joiner;
        Sums found{{}, std::move(chunks_)};
        found.boxes.reserve(pack_.boxes_.size());
        for (std::size_t i = 0; i < pack_.boxes_.size(); ++i) {
            std::uint32_t sum = 0;
            for (std::size_t part = pack_.parts_[i]; part < pack_.parts_[i + 1]; ++part) {
                sum = joiner.join(sum, parts_[part].sum, parts_[part].nbytes);
            }
            found.boxes.push_back(sum);
        }
        return found;
    }

private:
    struct Part {
        std::uint32_t sum;
        std::uint64_t nbytes;
    };

    static std::uintptr_t address_of(const std::byte* data) { return reinterpret_cast<std::uintptr_t>(data); }
    std::size_t block_bytes() const { return pack_.geometry_.chunk_bytes; }
    std::size_t ending_bytes() const { return pack_.geometry_.image_bytes - pack_.geometry_.payload_bytes; }

    void fill_ending(std::byte* to) const {
        std::memset(to, 0, ending_bytes());
        std::memcpy(to + ending_bytes() - pack_.ending_.size(), pack_.ending_.data(), pack_.ending_.size());
    }

    // Checksums of a chunk whose bytes are at `chunk`, or which `fills` first brings there.
    void sum_chunk(std::size_t number, std::byte* chunk, bool fills, Joiner& joiner) {
        const std::uint64_t begin = number * block_bytes();
        const std::uint64_t end = begin + block_bytes();
        const auto& boxes = pack_.boxes_;
        auto box = std::upper_bound(boxes.begin(), boxes.end(), begin,
                                    [](std::uint64_t at, const Box& one) { return at < one.offset + one.nbytes; });
        std::uint32_t sum = 0;
        std::uint64_t at = begin;
        const auto gap_to = [&](std::uint64_t until) {
            if (fills) {
                std::memset(chunk + (at - begin), 0, until - at);
            }
            sum = crc32c(chunk + (at - begin), until - at, sum);
            at = until;
        };
        for (; box != boxes.end() && box->offset < end; ++box) {
            if (box->nbytes == 0) {
                continue;
            }
            if (box->offset > at) {
                gap_to(box->offset);
            }
            const std::uint64_t n = std::min(end, box->offset + box->nbytes) - at;
            std::byte* const place = chunk + (at - begin);
            const std::uint32_t own =
                fills ? copy_summed(place, pointer(box->address + (at - box->offset)), n) : crc32c(place, n, 0);
            const auto index = static_cast<std::size_t>(box - boxes.begin());
            parts_[pack_.parts_[index] + (number - box->offset / block_bytes())] = {own, n};
            sum = joiner.join(sum, own, n);
            at += n;
        }
        if (at < end) {
            gap_to(end);
        }
        chunks_[number] = sum;
    }

    const Pack& pack_;
    int fd_;
    const WriteOptions& options_;
    std::vector<Part> parts_;
    std::vector<std::uint32_t> chunks_;
    std::atomic<std::size_t> next_ = 0;
    Clock::time_point begin_ = Clock::now();
};

// Room for the whole file at once: a full disk shows now, and writes that do not extend the file need not wait for each other.
void Pack::reserve(int fd, const OnIdle& on_idle) const {
    const auto nbytes = static_cast<off_t>(geometry_.image_bytes);
    while (nbytes != 0 && fallocate(fd, 0, 0, nbytes) != 0 && errno != EOPNOTSUPP && errno != ENOSYS) {
        if (errno != EINTR) {
            throw SystemFailure(errno, "reserving " + std::to_string(nbytes) + " bytes of fd " + std::to_string(fd));
        }
        on_idle();
    }
}

Sums Pack::write(int fd, const WriteOptions& options, const OnIdle& on_idle) const {
    check(options.depth != 0 && options.crew.threads != 0, "depth and threads must be at least 1");
    reserve(fd, on_idle);
    Writer writer(*this, fd, options);
    run_crew(options.crew, [&](const std::atomic<bool>& stop) { writer.work(stop); }, on_idle);
    return writer.sums();
}

}  // namespace ftrain

// What the programs in this folder share: checks that name their line, temporary files, bytes that differ from place to place.
#pragma once

#include <sys/ioctl.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition) check::that(condition, __FILE__, __LINE__, #condition)

#define CHECK_THROWS(type, expression)                                                                      \
    check::that(check::throws<type>([&] { (void)(expression); }), __FILE__, __LINE__, #expression " throws " #type)

namespace check {

using Bytes = std::vector<std::byte>;

inline void that(bool holds, const char* file, int line, const char* claim) {
    if (!holds) {
        std::fprintf(stderr, "%s:%d: not so: %s\n", file, line, claim);
        std::exit(1);
    }
}

template <class Expected, class Call>
bool throws(Call call) {
    try {
        call();
    } catch (const Expected&) {
        return true;
    }
    return false;
}

inline Bytes bytes_of(std::size_t count, std::uint32_t seed) {
    Bytes bytes(count);
    std::uint32_t state = seed * 2654435761U + 1;
    for (std::byte& byte : bytes) {
        state = state * 1664525U + 1013904223U;
        byte = static_cast<std::byte>(state >> 24);
    }
    return bytes;
}

inline std::uintptr_t address_of(const void* data) {
    return reinterpret_cast<std::uintptr_t>(data);
}

// A file that has no name any more, and goes with its descriptor.
class TemporaryFile {
public:
    explicit TemporaryFile(std::size_t nbytes = 0) {
        const char* folder = std::getenv("TMPDIR");
        std::string path = std::string(folder != nullptr ? folder : "/tmp") + "/ftrain-check-XXXXXX";
        fd_ = mkstemp(path.data());
        CHECK(fd_ >= 0);
        CHECK(unlink(path.c_str()) == 0);
        CHECK(ftruncate(fd_, static_cast<off_t>(nbytes)) == 0);
    }
    ~TemporaryFile() { close(fd_); }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;

    int fd() const { return fd_; }

    Bytes bytes(std::size_t nbytes) const {
        Bytes found(nbytes);
        CHECK(pread(fd_, found.data(), nbytes, 0) == static_cast<ssize_t>(nbytes));
        return found;
    }

    void write(const Bytes& bytes) const {
        CHECK(pwrite(fd_, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
    }

private:
    int fd_ = -1;
};

// A pipe into which somebody writes, late.
class LatePipe {
public:
    explicit LatePipe(const Bytes& bytes) {
        CHECK(pipe(ends_) == 0);
        writer_ = std::jthread([this, &bytes] {
            std::this_thread::sleep_for(std::chrono::milliseconds(30));
            CHECK(write(ends_[1], bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
        });
    }
    ~LatePipe() {
        left_bytes();
        close(ends_[0]);
        close(ends_[1]);
    }
    LatePipe(const LatePipe&) = delete;
    LatePipe& operator=(const LatePipe&) = delete;

    int read_end() const { return ends_[0]; }

    // What was written and nobody has read.
    int left_bytes() {
        int count = -1;
        if (writer_.joinable()) {
            writer_.join();
        }
        CHECK(ioctl(ends_[0], FIONREAD, &count) == 0);
        return count;
    }

private:
    int ends_[2] = {-1, -1};
    std::jthread writer_;
};

}  // namespace check

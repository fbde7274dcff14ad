#include "file.hpp"

#include <unistd.h>

#include <cerrno>
#include <limits>
#include <stdexcept>
#include <string>

namespace ftrain {

namespace {

void check_range(std::size_t nbytes, std::uint64_t offset) {
    constexpr auto end_max = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
    if (offset > end_max || nbytes > end_max - offset) {
        throw std::invalid_argument("offset and size lie beyond what a file can hold");
    }
}

std::string attempt(const char* verb, int fd, std::size_t nbytes, std::uint64_t offset, std::size_t done) {
    return std::string(verb) + " of " + std::to_string(nbytes) + " bytes at offset " + std::to_string(offset) + " of fd " +
           std::to_string(fd) + ", after " + std::to_string(done) + " bytes";
}

}  // namespace

void write_from(int fd, std::uintptr_t address, std::size_t nbytes, std::uint64_t offset, OnInterrupt on_interrupt) {
    check_range(nbytes, offset);
    std::size_t done = 0;
    while (done < nbytes) {
        const ssize_t n = pwrite(fd, reinterpret_cast<const void*>(address + done), nbytes - done,
                                 static_cast<off_t>(offset + done));
        if (n > 0) {
            done += static_cast<std::size_t>(n);
        } else if (n < 0 && errno == EINTR) {
            on_interrupt();
        } else {
            // Nothing written and no error would go round for ever.
            throw SystemFailure(n == 0 ? EIO : errno, attempt("write", fd, nbytes, offset, done));
        }
    }
}

void read_into(int fd, std::uintptr_t address, std::size_t nbytes, std::uint64_t offset, OnInterrupt on_interrupt) {
    check_range(nbytes, offset);
    std::size_t done = 0;
    while (done < nbytes) {
        const ssize_t n =
            pread(fd, reinterpret_cast<void*>(address + done), nbytes - done, static_cast<off_t>(offset + done));
        if (n > 0) {
            done += static_cast<std::size_t>(n);
        } else if (n == 0) {
            throw ShortFile("the file ends early: " + attempt("read", fd, nbytes, offset, done));
        } else if (errno == EINTR) {
            on_interrupt();
        } else {
            throw SystemFailure(errno, attempt("read", fd, nbytes, offset, done));
        }
    }
}

}  // namespace ftrain

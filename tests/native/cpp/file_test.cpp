// Whole reads and writes: at their offset, short, refused.
#include "file.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "check.hpp"

using namespace ftrain;
using check::address_of;
using check::Bytes;
using check::TemporaryFile;

namespace {

constexpr std::size_t NBYTES = std::size_t{1} << 20;

void never() {
    CHECK(!"nothing interrupted it");
}

// The errno and the text of the failure.
template <class Call>
std::pair<int, std::string> failure_of(Call call) {
    try {
        call();
    } catch (const SystemFailure& failure) {
        return {failure.code(), failure.what()};
    }
    return {0, ""};
}

bool names(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

void written_bytes_are_read_back_at_their_offset() {
    const TemporaryFile file;
    const Bytes data = check::bytes_of(NBYTES, 1);
    write_from(file.fd(), address_of(data.data()) + 3, 1000, 77, never);
    const Bytes found = file.bytes(1077);
    CHECK(std::equal(found.begin() + 77, found.end(), data.begin() + 3));
    CHECK(std::all_of(found.begin(), found.begin() + 77, [](std::byte one) { return one == std::byte{0}; }));
    Bytes read(500);
    read_into(file.fd(), address_of(read.data()), read.size(), 177, never);
    CHECK(std::equal(read.begin(), read.end(), data.begin() + 103));
    write_from(-1, 0, 0, 0, never);
    read_into(-1, 0, 0, 0, never);
}

void a_file_that_ends_early_says_how_far_it_got() {
    const TemporaryFile file(1000);
    Bytes read(2000);
    try {
        read_into(file.fd(), address_of(read.data()), read.size(), 10, never);
        CHECK(!"it was as long as that");
    } catch (const ShortFile& error) {
        CHECK(names(error.what(), "read of 2000 bytes at offset 10 of fd " + std::to_string(file.fd()) + ", after 990 bytes"));
    }
}

void what_the_kernel_refuses_is_named_with_its_errno() {
    const TemporaryFile file;
    const Bytes data(4096);
    const std::uintptr_t memory = address_of(data.data());
    const auto closed = failure_of([&] { write_from(-1, memory, 10, 5, never); });
    CHECK(closed.first == EBADF && names(closed.second, "write of 10 bytes at offset 5 of fd -1"));
    CHECK(failure_of([&] { write_from(file.fd(), 8, 4096, 0, never); }).first == EFAULT);
    const int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    const auto no_space = failure_of([&] { write_from(full, memory, 4096, 0, never); });
    close(full);
    CHECK(no_space.first == ENOSPC && names(no_space.second, "after 0 bytes"));
    const auto beyond = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
    CHECK_THROWS(std::invalid_argument, write_from(file.fd(), memory, 10, beyond, never));
    CHECK_THROWS(std::invalid_argument, read_into(file.fd(), memory, 10, beyond, never));
}

}  // namespace

int main() {
    written_bytes_are_read_back_at_their_offset();
    a_file_that_ends_early_says_how_far_it_got();
    what_the_kernel_refuses_is_named_with_its_errno();
}

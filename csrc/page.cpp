#include "page.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <climits>
#include <cmath>
#include <stdexcept>

namespace ftrain {

static_assert(std::atomic_ref<std::int64_t>::is_always_lock_free, "words are shared between processes");

namespace {

constexpr double SECONDS_MAX = 1e9;  // thirty years: longer is for ever, and fits no time_t arithmetic worth having

timespec deadline_after(double seconds) {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    const double whole = std::floor(seconds);
    now.tv_sec += static_cast<time_t>(whole);
    now.tv_nsec += static_cast<long>((seconds - whole) * 1e9);
    if (now.tv_nsec >= 1'000'000'000) {
        now.tv_sec += 1;
        now.tv_nsec -= 1'000'000'000;
    }
    return now;
}

}  // namespace

int create_page(const std::string& name) {
    const int fd = memory_file(name, false);
    // Sealed: whoever holds the descriptor can write words, but not take the memory away under the other side.
    if (ftruncate(fd, PAGE_BYTES) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        const int code = errno;
        close(fd);
        throw SystemFailure(code, "sizing the control page '" + name + "'");
    }
    return fd;
}

std::int64_t Page::load(std::ptrdiff_t index) const {
    return std::atomic_ref(word(index)).load(std::memory_order_seq_cst);
}

void Page::store(std::ptrdiff_t index, std::int64_t value) const {
    std::atomic_ref(word(index)).store(value, std::memory_order_seq_cst);
}

std::int64_t Page::add(std::ptrdiff_t index, std::int64_t amount) const {
    // Atomic integers wrap around; plain signed addition may not.
    const std::int64_t before = std::atomic_ref(word(index)).fetch_add(amount, std::memory_order_seq_cst);
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(before) + static_cast<std::uint64_t>(amount));
}

bool Page::wait(std::ptrdiff_t index, std::int64_t expected, double timeout_seconds, OnInterrupt on_interrupt) const {
    if (std::isnan(timeout_seconds)) {
        throw std::invalid_argument("timeout_seconds is not a number");
    }
    const bool endless = timeout_seconds > SECONDS_MAX;
    const timespec deadline = deadline_after(endless ? 0.0 : std::fmax(timeout_seconds, 0.0));
    // An absolute deadline, so that interrupted waits do not start over. Not FUTEX_PRIVATE: the other side is a process.
    while (load(index) == expected) {
        const long rc = syscall(SYS_futex, futex(index), FUTEX_WAIT_BITSET, static_cast<std::uint32_t>(expected),
                                endless ? nullptr : &deadline, nullptr, FUTEX_BITSET_MATCH_ANY);
        if (rc == 0) {
            return load(index) != expected;  // a wake without a change is to let whoever waits look at something else
        }
        if (errno == EAGAIN) {
            continue;
        }
        if (errno == ETIMEDOUT) {
            return load(index) != expected;
        }
        if (errno != EINTR) {
            throw SystemFailure(errno, "futex wait on word " + std::to_string(index) + " of the control page");
        }
        on_interrupt();
    }
    return true;
}

void Page::wake(std::ptrdiff_t index) const {
    if (syscall(SYS_futex, futex(index), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0) < 0) {
        throw SystemFailure(errno, "futex wake on word " + std::to_string(index) + " of the control page");
    }
}

std::int64_t& Page::word(std::ptrdiff_t index) const {
    if (index < 0 || static_cast<std::size_t>(index) >= PAGE_WORDS) {
        throw std::out_of_range("the control page has words 0 to " + std::to_string(PAGE_WORDS - 1) + ", not " +
                                std::to_string(index));
    }
    return reinterpret_cast<std::int64_t*>(mapping_.data())[index];
}

std::uint32_t* Page::futex(std::ptrdiff_t index) const {
    // A futex is 32 bits wide: the low half of the word, which is the half that a counter changes.
    constexpr std::ptrdiff_t low = std::endian::native == std::endian::little ? 0 : 1;
    return reinterpret_cast<std::uint32_t*>(&word(index)) + low;
}

}  // namespace ftrain

#include "courtesy.hpp"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <system_error>
#include <thread>

namespace ftrain {

namespace {

using Seconds = std::chrono::duration<double>;

constexpr Seconds LOOK_EVERY(0.02);
constexpr auto WINDOW = std::chrono::milliseconds(2);  // of running: shorter ones tell more of chance than of others

// The calling thread's own file. In a child that was forked the parent's tells of the parent's thread, and may be closed by now.
class OwnFile {
public:
    OwnFile() = default;
    ~OwnFile() {
        if (fd_ >= 0 && pid_ == getpid()) {
            close(fd_);
        }
    }
    OwnFile(const OwnFile&) = delete;
    OwnFile& operator=(const OwnFile&) = delete;

    int fd() {
        if (pid_ != getpid()) {
            fd_ = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
            pid_ = getpid();
        }
        return fd_;
    }

private:
    int fd_ = -1;
    pid_t pid_ = 0;
};

// None where the kernel does not tell.
std::optional<Schedule> own_schedule() {
    thread_local OwnFile file;
    std::array<char, 96> text{};
    const int fd = file.fd();
    const ssize_t length = fd < 0 ? -1 : pread(fd, text.data(), text.size(), 0);
    if (length <= 0) {
        return std::nullopt;
    }
    std::array<std::int64_t, 2> found{};  // "ran waited slices"
    const char* at = text.data();
    const char* const end = at + length;
    for (std::int64_t& value : found) {
        const auto [after, problem] = std::from_chars(at, end, value);
        if (problem != std::errc()) {
            return std::nullopt;
        }
        at = std::min(end, after + 1);
    }
    return Schedule{std::chrono::nanoseconds(found[0]), std::chrono::nanoseconds(found[1])};
}

}  // namespace

void sleep_until_due(std::chrono::steady_clock::time_point begin, double seconds, const std::atomic<bool>& stop) {
    const auto left = [&] { return Seconds(seconds) - (std::chrono::steady_clock::now() - begin); };
    for (Seconds rest = left(); rest > Seconds(0) && !stop; rest = left()) {
        std::this_thread::sleep_for(std::min(rest, LOOK_EVERY));
    }
}

Taken::Taken() : before_(own_schedule()) {}

double Taken::seconds() const {
    const auto now = before_.has_value() ? own_schedule() : std::nullopt;
    return now.has_value() ? Seconds(std::min(now->ran - before_->ran, now->waited - before_->waited)).count() : 0;
}

Courtesy::Courtesy(double processors_max) : processors_max_(processors_max), since_(Clock::now()) {
    if (processors_max_ > 0) {
        last_ = own_schedule();
    }
}

void Courtesy::pause(const std::atomic<bool>& stop) {
    const auto now = last_.has_value() ? own_schedule() : std::nullopt;
    if (!now.has_value()) {
        return;
    }
    const auto ran = now->ran - last_->ran;
    if (ran < WINDOW) {
        return;
    }
    if (now->waited - last_->waited > ran) {
        sleep_until_due(since_, Seconds(ran).count() / processors_max_, stop);
    }
    last_ = now;
    since_ = Clock::now();
}

void wake_politely() {
    const sched_param none{};
    (void)sched_setscheduler(0, SCHED_BATCH, &none);
}

}  // namespace ftrain

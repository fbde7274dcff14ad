#include "courtesy.hpp"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <system_error>
#include <thread>

namespace ftrain {

namespace {

using Seconds = std::chrono::duration<double>;

constexpr Seconds LOOK_EVERY(0.02);
constexpr auto WINDOW = std::chrono::milliseconds(2);  // of running: shorter ones tell more of chance than of others

}  // namespace

void sleep_until_due(std::chrono::steady_clock::time_point begin, double seconds, const std::atomic<bool>& stop) {
    const auto left = [&] { return Seconds(seconds) - (std::chrono::steady_clock::now() - begin); };
    for (Seconds rest = left(); rest > Seconds(0) && !stop; rest = left()) {
        std::this_thread::sleep_for(std::min(rest, LOOK_EVERY));
    }
}

Courtesy::Courtesy(double processors_max) : processors_max_(processors_max), since_(Clock::now()) {
    if (processors_max_ > 0) {
        fd_ = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
        last_ = schedule().value_or(Schedule{});
    }
}

Courtesy::~Courtesy() {
    if (fd_ >= 0) {
        close(fd_);
    }
}

std::optional<Courtesy::Schedule> Courtesy::schedule() const {
    std::array<char, 96> text{};
    const ssize_t length = fd_ < 0 ? -1 : pread(fd_, text.data(), text.size(), 0);
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
    return Schedule{Nanoseconds(found[0]), Nanoseconds(found[1])};
}

void Courtesy::pause(const std::atomic<bool>& stop) {
    const auto now = schedule();
    if (!now.has_value()) {
        return;
    }
    const Nanoseconds ran = now->ran - last_.ran;
    if (ran < WINDOW) {
        return;
    }
    if (now->waited - last_.waited > ran) {
        sleep_until_due(since_, Seconds(ran).count() / processors_max_, stop);
    }
    last_ = *now;
    since_ = Clock::now();
}

void wake_politely() {
    const sched_param none{};
    (void)sched_setscheduler(0, SCHED_BATCH, &none);
}

}  // namespace ftrain

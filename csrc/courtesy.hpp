// Work beside a training loop: where others wait for the processors, it takes a small share of them, else all it can use.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>

namespace ftrain {

// Sleeps until `seconds` (a double: the clock's own would overflow) have passed since `begin`, or until told to stop.
void sleep_until_due(std::chrono::steady_clock::time_point begin, double seconds, const std::atomic<bool>& stop);

// Of one thread, which makes and uses it. Niceness alone does not do: a thread of any niceness takes memory's bandwidth and the
// caches while it runs, and a tenth of a processor is more than training should lose.
class Courtesy {
public:
    // `processors_max`: of one processor, how much the thread takes while others wait with it; 0 for no bound.
    explicit Courtesy(double processors_max);
    ~Courtesy();
    Courtesy(const Courtesy&) = delete;
    Courtesy& operator=(const Courtesy&) = delete;

    // Between two pieces of work: where the thread waited for longer than it ran, sleeps for as long as it ran too much, or
    // until told to stop.
    void pause(const std::atomic<bool>& stop);

private:
    using Clock = std::chrono::steady_clock;
    using Nanoseconds = std::chrono::nanoseconds;

    struct Schedule {
        Nanoseconds ran;     // on a processor
        Nanoseconds waited;  // for one, ready to run
    };

    std::optional<Schedule> schedule() const;  // none where the kernel does not tell

    double processors_max_;
    int fd_ = -1;
    Schedule last_{};
    Clock::time_point since_;
};

// The calling thread, when it is woken, does not take the processor from whoever woke it: the training thread, in the middle of a
// call. A wish: where it is refused, nothing changes.
void wake_politely();

}  // namespace ftrain

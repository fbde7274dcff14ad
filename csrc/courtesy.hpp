// Work beside a training loop: where others wait for the processors, it takes a small share of them, else all it can use.
#pragma once

#include <atomic>
#include <chrono>
#include <optional>

namespace ftrain {

// Sleeps until `seconds` (a double: the clock's own would overflow) have passed since `begin`, or until told to stop.
void sleep_until_due(std::chrono::steady_clock::time_point begin, double seconds, const std::atomic<bool>& stop);

// What the kernel counts of a thread since it began.
struct Schedule {
    std::chrono::nanoseconds ran;     // on a processor
    std::chrono::nanoseconds waited;  // for one, ready to run
};

// Processor time that one thread, which makes and asks this, takes from others from now on: as much as it has to wait for a processor
// itself, and no more than it runs. 0 where the kernel does not tell.
class Taken {
public:
    Taken();
    double seconds() const;

private:
    std::optional<Schedule> before_;
};

// Of one thread, which makes and uses it. Niceness alone does not do: a thread of any niceness takes memory's bandwidth and the
// caches while it runs, and a tenth of a processor is more than training should lose.
class Courtesy {
public:
    // `processors_max`: of one processor, how much the thread takes while others wait with it; 0 for no bound.
    explicit Courtesy(double processors_max);

    // Between two pieces of work: where the thread waited for longer than it ran, sleeps for as long as it ran too much, or
    // until told to stop.
    void pause(const std::atomic<bool>& stop);

private:
    using Clock = std::chrono::steady_clock;

    double processors_max_;
    std::optional<Schedule> last_;
    Clock::time_point since_;
};

// The calling thread, when it is woken, does not take the processor from whoever woke it: the training thread, in the middle of a
// call. A wish: where it is refused, nothing changes.
void wake_politely();

}  // namespace ftrain

// Threads that do one piece of work together while the caller looks after interruption.
#pragma once

#include <atomic>
#include <functional>

namespace ftrain {

// Called now and then while a crew works; what it throws ends the work and comes out of `run_crew`.
using OnIdle = std::function<void()>;

struct CrewOptions {
    unsigned threads = 1;
    int nice = 0;  // added to the threads' own: 0 as the caller, 10 below it. Their I/O priority follows.
};

// Runs `work` in each thread until all return. The first exception of any, or of `on_idle`, sets `stop` and is thrown once no
// thread runs any more.
void run_crew(const CrewOptions& options, const std::function<void(const std::atomic<bool>& stop)>& work,
              const OnIdle& on_idle);

}  // namespace ftrain

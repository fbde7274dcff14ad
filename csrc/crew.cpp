#include "crew.hpp"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace ftrain {

namespace {

constexpr auto LOOK_EVERY = std::chrono::milliseconds(20);

// ioprio_set(2): best effort, the lowest of its eight levels; schedulers without priorities ignore it.
constexpr int IOPRIO_WHO_PROCESS = 1;
constexpr int IOPRIO_LOWEST = (2 << 13) | 7;

void lower_priority(int nice) {
    if (nice == 0) {
        return;
    }
    const auto thread = static_cast<id_t>(syscall(SYS_gettid));
    // A wish: where it is refused the work is done all the same.
    setpriority(PRIO_PROCESS, thread, getpriority(PRIO_PROCESS, thread) + nice);
    syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_LOWEST);
}

}  // namespace

void run_crew(const CrewOptions& options, const std::function<void(const std::atomic<bool>& stop)>& work,
              const OnIdle& on_idle) {
    std::mutex mutex;
    std::condition_variable changed;
    std::atomic<bool> stop = false;
    std::exception_ptr error;
    unsigned running = 0;

    const auto give_up = [&](const std::exception_ptr& cause) {
        if (!error) {
            error = cause;
        }
        stop = true;
    };
    std::vector<std::jthread> threads;
    std::unique_lock lock(mutex);
    const auto serve = [&] {
        lower_priority(options.nice);
        std::exception_ptr cause;
        try {
            work(stop);
        } catch (...) {
            cause = std::current_exception();
        }
        const std::lock_guard guard(mutex);
        if (cause) {
            give_up(cause);
        }
        --running;
        changed.notify_one();
    };
    try {
        while (running < options.threads) {
            threads.emplace_back(serve);
            ++running;
        }
    } catch (...) {
        give_up(std::current_exception());  // those that began end soon
    }
    while (!changed.wait_for(lock, LOOK_EVERY, [&] { return running == 0; })) {
        lock.unlock();
        std::exception_ptr cause;
        try {
            if (!stop) {
                on_idle();
            }
        } catch (...) {
            cause = std::current_exception();
        }
        lock.lock();
        if (cause) {
            give_up(cause);
        }
    }
    lock.unlock();
    threads.clear();
    if (error) {
        std::rethrow_exception(error);
    }
}

}  // namespace ftrain

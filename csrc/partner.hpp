// A thread that shares work of some hundred microseconds with its caller: too short to wait until a thread has woken up.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>

namespace ftrain {

class Partner {
public:
    using Work = std::function<bool(std::size_t begin, std::size_t end)>;

    Partner();
    ~Partner();
    Partner(const Partner&) = delete;
    Partner& operator=(const Partner&) = delete;

    // There is going to be work soon: the thread wakes up, and looks out for it for as long as it should take to come.
    void expect();

    // Calls `work`, which must not throw, for pieces of [0, count), here and in the thread if it is awake, until it has
    // answered false or been called for all. Whether it answered true each time; no call is in progress any more.
    bool share(std::size_t count, std::size_t piece, const Work& work);

    // After a fork the thread is the parent's alone.
    bool is_here() const;

private:
    class Shared;

    void look_out();

    std::atomic<Shared*> work_{nullptr};
    std::atomic<unsigned> inside_{0};  // threads that may be at `work_`
    std::atomic<bool> ends_{false};
    std::mutex mutex_;
    std::condition_variable roused_;
    bool expects_ = false;
    pid_t pid_;
    std::thread thread_;
};

}  // namespace ftrain

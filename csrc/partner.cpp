#include "partner.hpp"

#include <unistd.h>

#include <algorithm>

#include "courtesy.hpp"

namespace ftrain {

namespace {

constexpr auto PATIENCE = std::chrono::microseconds(500);
constexpr unsigned TURNS = 64;  // of waiting, between two looks at the clock

void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

}  // namespace

// One call of `share`.
class Partner::Shared {
public:
    Shared(std::size_t count, std::size_t piece, const Work& work) : count_(count), piece_(piece), work_(work) {}

    void take_part() {
        while (!refused_.load(std::memory_order_relaxed)) {
            const std::size_t begin = next_.fetch_add(piece_, std::memory_order_relaxed);
            if (begin >= count_) {
                return;
            }
            if (!work_(begin, std::min(begin + piece_, count_))) {
                refused_.store(true, std::memory_order_relaxed);
            }
        }
    }

    bool refused() const { return refused_; }

private:
    std::size_t count_;
    std::size_t piece_;
    const Work& work_;
    std::atomic<std::size_t> next_{0};
    std::atomic<bool> refused_{false};
};

Partner::Partner() : pid_(getpid()), thread_([this] { look_out(); }) {}

Partner::~Partner() {
    {
        const std::lock_guard lock(mutex_);
        ends_ = true;
    }
    roused_.notify_one();
    thread_.join();
}

void Partner::expect() {
    {
        const std::lock_guard lock(mutex_);
        expects_ = true;
    }
    roused_.notify_one();
}

bool Partner::share(std::size_t count, std::size_t piece, const Work& work) {
    Shared shared(count, piece, work);
    work_ = &shared;
    shared.take_part();
    // Either the thread finds no work any more, or it is seen to be inside: all four accesses are in one order.
    work_ = nullptr;
    for (unsigned turn = 1; inside_ != 0; ++turn) {
        if (turn % TURNS == 0) {
            std::this_thread::yield();
        } else {
            rest();
        }
    }
    return !shared.refused();
}

bool Partner::is_here() const { return pid_ == getpid(); }

void Partner::look_out() {
    wake_politely();
    while (!ends_) {
        {
            std::unique_lock lock(mutex_);
            roused_.wait(lock, [this] { return expects_ || ends_; });
            expects_ = false;
        }
        const auto until = std::chrono::steady_clock::now() + PATIENCE;
        bool had_work = false;
        for (unsigned turn = 1; !had_work && !ends_; ++turn) {
            if (work_.load(std::memory_order_relaxed) != nullptr) {
                ++inside_;
                if (Shared* const shared = work_) {
                    shared->take_part();
                    had_work = true;
                }
                --inside_;
            }
            if (turn % TURNS == 0 && std::chrono::steady_clock::now() > until) {
                break;
            }
            rest();
        }
    }
}

}  // namespace ftrain

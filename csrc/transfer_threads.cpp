#include "transfer_threads.hpp"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "file.hpp"

namespace ftrain {

namespace {

constexpr unsigned THREADS_MAX = 8;

void go_on() {}

class ThreadQueue final : public TransferQueue {
public:
    explicit ThreadQueue(unsigned depth) {
        for (unsigned i = 0; i < std::min(depth, THREADS_MAX); ++i) {
            threads_.emplace_back([this](const std::stop_token& stop) { serve(stop); });
        }
    }

    ~ThreadQueue() override {
        while (in_flight_ != 0) {
            finished();
        }
        for (std::jthread& thread : threads_) {
            thread.request_stop();
        }
        has_work_.notify_all();
    }

    void submit(unsigned slot, const Transfer& transfer) override {
        {
            const std::lock_guard lock(mutex_);
            waiting_.push_back({slot, transfer});
        }
        ++in_flight_;
        has_work_.notify_one();
    }

    unsigned wait() override {
        const auto [slot, error] = finished();
        if (error) {
            std::rethrow_exception(error);
        }
        return slot;
    }

    const char* name() const noexcept override { return "threads"; }

private:
    struct Waiting {
        unsigned slot;
        Transfer transfer;
    };
    using Finished = std::pair<unsigned, std::exception_ptr>;

    Finished finished() {
        std::unique_lock lock(mutex_);
        has_result_.wait(lock, [this] { return !finished_.empty(); });
        const Finished found = finished_.front();
        finished_.pop_front();
        --in_flight_;
        return found;
    }

    void serve(const std::stop_token& stop) {
        std::unique_lock lock(mutex_);
        while (has_work_.wait(lock, stop, [this] { return !waiting_.empty(); })) {
            const auto [slot, transfer] = waiting_.front();
            waiting_.pop_front();
            lock.unlock();
            Finished result{slot, nullptr};
            try {
                const auto run = transfer.writes ? write_from : read_into;
                run(transfer.fd, transfer.address, transfer.nbytes, transfer.offset, go_on);
            } catch (...) {
                result.second = std::current_exception();
            }
            lock.lock();
            finished_.push_back(std::move(result));
            has_result_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable_any has_work_;
    std::condition_variable has_result_;
    std::deque<Waiting> waiting_;
    std::deque<Finished> finished_;
    std::vector<std::jthread> threads_;  // last: it ends before what it uses
};

}  // namespace

std::unique_ptr<TransferQueue> make_thread_queue(unsigned depth) {
    return std::make_unique<ThreadQueue>(depth);
}

}  // namespace ftrain

#include "copy.hpp"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <stop_token>
#include <thread>
#include <utility>

#include "courtesy.hpp"
#include "stream.hpp"

namespace ftrain {

namespace {

// Starting a thread costs about what copying this much does; and so often does a copying thread look what is left.
constexpr std::size_t PIECE_BYTES = std::size_t{1} << 20;
constexpr std::size_t LINE_BYTES = 64;  // no cache line is written by two threads

}  // namespace

CopyPlan::CopyPlan(std::vector<Copy> copies) : copies_(std::move(copies)) {
    ends_.reserve(copies_.size());
    std::size_t end = 0;
    for (const Copy& copy : copies_) {
        if (copy.nbytes != 0 && copy.from == 0) {
            throw std::invalid_argument("a copy was given a null address");
        }
        if (copy.nbytes > std::numeric_limits<std::size_t>::max() - end) {
            throw std::invalid_argument("the copies have more bytes than an address space");
        }
        end += copy.nbytes;
        ends_.push_back(end);
    }
}

void CopyPlan::run(std::uintptr_t base, std::size_t begin, std::size_t end) const {
    auto index = static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin());
    for (std::size_t at = begin; at < end; ++index) {
        const Copy& copy = copies_[index];
        if (copy.nbytes == 0) {
            continue;  // its addresses may be null
        }
        const std::size_t within = at - (ends_[index] - copy.nbytes);
        const std::size_t n = std::min(end, ends_[index]) - at;
        stream_copy(reinterpret_cast<void*>(base + copy.to + within), reinterpret_cast<const void*>(copy.from + within), n);
        at += n;
    }
}

void copy_batch(std::span<const Copy> copies, unsigned threads) {
    if (threads == 0) {
        throw std::invalid_argument("copy_batch needs at least one thread");
    }
    if (std::any_of(copies.begin(), copies.end(), [](const Copy& copy) { return copy.nbytes != 0 && copy.to == 0; })) {
        throw std::invalid_argument("copy_batch was given a null address");
    }
    const CopyPlan plan({copies.begin(), copies.end()});
    const std::size_t total = plan.nbytes();
    const std::size_t shares = std::clamp<std::size_t>(total / PIECE_BYTES, 1, threads);
    const std::size_t share = (total / shares + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
    std::vector<std::jthread> others;
    others.reserve(shares - 1);
    for (std::size_t i = 1; i < shares; ++i) {
        const std::size_t end = i + 1 == shares ? total : std::min(total, (i + 1) * share);
        others.emplace_back([&plan, begin = std::min(total, i * share), end] { plan.run(0, begin, end); });
    }
    plan.run(0, 0, shares == 1 ? total : std::min(total, share));
}

bool CopyJob::done() const {
    const std::lock_guard lock(mutex_);
    return copied_ == plan_->nbytes();
}

bool CopyJob::copy_piece() {
    std::size_t begin = 0;
    std::size_t end = 0;
    {
        const std::lock_guard lock(mutex_);
        begin = taken_;
        end = std::min(plan_->nbytes(), begin + PIECE_BYTES);
        if (begin == end) {
            return false;
        }
        taken_ = end;
    }
    plan_->run(base_, begin, end);
    const std::lock_guard lock(mutex_);
    copied_ += end - begin;
    if (copied_ == plan_->nbytes()) {
        finished_.notify_all();
    }
    return true;
}

void CopyJob::copy_pieces(const std::stop_token& stop) {
    {
        const std::lock_guard lock(mutex_);
        if (taken_ == plan_->nbytes()) {
            return;
        }
        ++copying_;
    }
    const Taken taken;
    while (!stop.stop_requested() && copy_piece()) {
    }
    const double seconds = taken.seconds();
    const std::lock_guard lock(mutex_);
    taken_seconds_ += seconds;
    --copying_;
    finished_.notify_all();
}

double CopyJob::taken_seconds() {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [this] { return copying_ == 0; });
    return taken_seconds_;
}

void CopyJob::wait() {
    copy_pieces({});
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [this] { return copied_ == plan_->nbytes(); });
}

class Copier::Team {
public:
    explicit Team(unsigned threads) {
        for (unsigned i = 0; i < threads; ++i) {
            threads_.emplace_back([this](const std::stop_token& stop) { serve(stop); });
        }
    }

    void add(std::shared_ptr<CopyJob> job) {
        {
            const std::lock_guard lock(mutex_);
            jobs_.push_back(std::move(job));
        }
        has_work_.notify_all();
    }

private:
    void serve(const std::stop_token& stop) {
        wake_politely();
        std::unique_lock lock(mutex_);
        while (has_work_.wait(lock, stop, [this] { return !jobs_.empty(); })) {
            const std::shared_ptr<CopyJob> job = jobs_.front();
            lock.unlock();
            job->copy_pieces(stop);
            lock.lock();
            const auto found = std::find(jobs_.begin(), jobs_.end(), job);
            if (found != jobs_.end()) {
                jobs_.erase(found);
            }
        }
    }

    std::mutex mutex_;
    std::condition_variable_any has_work_;
    std::vector<std::shared_ptr<CopyJob>> jobs_;
    std::vector<std::jthread> threads_;  // last: it ends before what it uses
};

Copier::Copier(unsigned threads) : pid_(getpid()) {
    if (threads == 0) {
        throw std::invalid_argument("a copier needs at least one thread");
    }
    team_ = std::make_unique<Team>(threads);
}

Copier::~Copier() {
    if (getpid() != pid_) {
        // What the parent's threads sleep on or hold can be neither destroyed nor waited for where they are not.
        (void)team_.release();
    }
}

std::shared_ptr<CopyJob> Copier::begin(std::shared_ptr<const CopyPlan> plan, std::uintptr_t base) {
    auto job = std::make_shared<CopyJob>(std::move(plan), base);
    if (getpid() == pid_) {
        team_->add(job);
    }
    return job;
}

}  // namespace ftrain

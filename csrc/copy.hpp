// Copies within this process: at once, or in threads of their own while the caller does something else.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <stop_token>
#include <vector>

namespace ftrain {

struct Copy {
    std::uintptr_t to;
    std::uintptr_t from;
    std::size_t nbytes;
};

// Does all copies and returns when they are done. Each copy's two ranges, and all destinations, must be disjoint.
void copy_batch(std::span<const Copy> copies, unsigned threads);

// Copies that are made again and again, to places that are counted from a base.
class CopyPlan {
public:
    // Copy.to is an offset from the base that `Copier::begin` is given. Throws std::invalid_argument for a null source, and
    // for more bytes than can be counted.
    explicit CopyPlan(std::vector<Copy> copies);

    std::size_t nbytes() const noexcept { return ends_.empty() ? 0 : ends_.back(); }

    // Copies the bytes [begin, end) of all its bytes laid in a row.
    void run(std::uintptr_t base, std::size_t begin, std::size_t end) const;

private:
    std::vector<Copy> copies_;
    std::vector<std::size_t> ends_;  // of each copy, in that row
};

// One run of a plan.
class CopyJob {
public:
    CopyJob(std::shared_ptr<const CopyPlan> plan, std::uintptr_t base) : plan_(std::move(plan)), base_(base) {}

    bool done() const;

    // Takes part in the copying, and returns once all of it is done.
    void wait();

    // Processor time that all who copied took from other threads: nearly none where processors idle. Waits for who still copies.
    double taken_seconds();

private:
    friend class Copier;
    void copy_pieces(const std::stop_token& stop);  // until none is left to take, or told to stop
    bool copy_piece();                              // false when no piece is left to take

    mutable std::mutex mutex_;
    std::condition_variable finished_;
    std::shared_ptr<const CopyPlan> plan_;
    std::uintptr_t base_;
    std::size_t taken_ = 0;   // bytes that some thread has taken
    std::size_t copied_ = 0;  // bytes that are there
    unsigned copying_ = 0;    // threads that have not yet said what they took
    double taken_seconds_ = 0;
};

// Threads that copy one job after the other. After a fork they are the parent's alone: in the child a job is copied by those
// who wait for it.
class Copier {
public:
    explicit Copier(unsigned threads);
    // Drops what no thread has begun: of a job that was dropped, `wait` copies the rest.
    ~Copier();
    Copier(const Copier&) = delete;
    Copier& operator=(const Copier&) = delete;

    // The sources must stay as they are until the job is done.
    std::shared_ptr<CopyJob> begin(std::shared_ptr<const CopyPlan> plan, std::uintptr_t base);

private:
    class Team;
    std::unique_ptr<Team> team_;
    pid_t pid_;  // of the process that has the threads
};

}  // namespace ftrain

// Copies by several threads, with several jobs at once and several who wait.
#include "copy.hpp"

#include <sys/wait.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "sums.hpp"

using namespace ftrain;
using check::address_of;
using check::Bytes;

namespace {

constexpr std::size_t NBYTES = (std::size_t{5} << 20) + 13;

std::shared_ptr<const CopyPlan> plan_of(const Bytes& source) {
    const std::uintptr_t from = address_of(source.data());
    const std::size_t half = source.size() / 2 + 1;
    return std::make_shared<const CopyPlan>(
        std::vector<Copy>{{0, 0, 0}, {0, from, half}, {half, 0, 0}, {half, from + half, source.size() - half}});
}

void batches_of_all_sizes_arrive() {
    for (const std::size_t nbytes : {std::size_t{0}, std::size_t{1}, std::size_t{4095}, std::size_t{4096}, NBYTES}) {
        const Bytes source = check::bytes_of(nbytes + 3, 1);
        Bytes target(nbytes + 3);
        const std::vector<Copy> copies{{0, 0, 0}, {address_of(target.data()) + 1, address_of(source.data()) + 2, nbytes}};
        copy_batch(copies, 3);
        CHECK(std::equal(target.begin() + 1, target.begin() + 1 + static_cast<std::ptrdiff_t>(nbytes), source.begin() + 2));
        CHECK(target.front() == std::byte{0} && target.back() == std::byte{0});
    }
    CHECK_THROWS(std::invalid_argument, copy_batch({}, 0));
    const std::vector<Copy> nowhere{{0, 1, 1}};
    CHECK_THROWS(std::invalid_argument, copy_batch(nowhere, 1));
}

void jobs_are_done_whoever_waits() {
    const Bytes source = check::bytes_of(NBYTES, 2);
    const auto plan = plan_of(source);
    Copier copier(3);
    std::vector<Bytes> targets(6, Bytes(NBYTES));
    std::vector<std::shared_ptr<CopyJob>> jobs;
    for (Bytes& target : targets) {
        jobs.push_back(copier.begin(plan, address_of(target.data())));
    }
    {
        std::vector<std::jthread> waiters;
        for (int i = 0; i < 4; ++i) {
            waiters.emplace_back([&] {
                for (auto job = jobs.rbegin(); job != jobs.rend(); ++job) {
                    (*job)->wait();
                }
            });
        }
    }
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        CHECK(jobs[i]->done() && targets[i] == source);
    }
}

void copier_that_goes_leaves_jobs_to_those_who_wait() {
    const Bytes source = check::bytes_of(NBYTES, 3);
    for (int round = 0; round < 20; ++round) {
        std::vector<Bytes> targets(3, Bytes(NBYTES));
        std::vector<std::shared_ptr<CopyJob>> jobs;
        {
            Copier copier(2);
            for (Bytes& target : targets) {
                jobs.push_back(copier.begin(plan_of(source), address_of(target.data())));
            }
        }
        for (std::size_t i = 0; i < jobs.size(); ++i) {
            jobs[i]->wait();
            CHECK(targets[i] == source);
        }
    }
}

void jobs_begin_in_several_threads_at_once() {
    const Bytes source = check::bytes_of(NBYTES, 4);
    Copier copier(2);
    std::vector<std::jthread> callers;
    for (int i = 0; i < 3; ++i) {
        callers.emplace_back([&] {
            for (int round = 0; round < 5; ++round) {
                Bytes target(NBYTES);
                copier.begin(plan_of(source), address_of(target.data()))->wait();
                CHECK(target == source);
            }
        });
    }
}

void forked_child_copies_by_itself_and_lets_go() {
    const Bytes source = check::bytes_of(NBYTES, 5);
    auto copier = std::make_unique<Copier>(2);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // so that its threads are likely to sleep by now
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        Bytes target(NBYTES);
        copier->begin(plan_of(source), address_of(target.data()))->wait();
        copier.reset();
        _exit(target == source ? 0 : 1);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void impossible_plans_are_refused() {
    CHECK_THROWS(std::invalid_argument, CopyPlan({{0, 0, 1}}));
    CHECK_THROWS(std::invalid_argument, CopyPlan({{0, 1, ~std::size_t{0}}, {0, 1, 1}}));
    CHECK_THROWS(std::invalid_argument, Copier(0));
}

}  // namespace

int main() {
    batches_of_all_sizes_arrive();
    forked_child_copies_by_itself_and_lets_go();
    jobs_are_done_whoever_waits();
    copier_that_goes_leaves_jobs_to_those_who_wait();
    jobs_begin_in_several_threads_at_once();
    impossible_plans_are_refused();
}

// Threads that work together: what ends them, and which of their exceptions comes out.
#include "crew.hpp"

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>

#include "check.hpp"
#include "failure.hpp"

using namespace ftrain;

namespace {

void nothing() {}

void until(const std::atomic<bool>& stop) {
    while (!stop) {
        std::this_thread::yield();
    }
}

void all_threads_work_once() {
    for (const unsigned threads : {1U, 2U, 9U}) {
        std::atomic<unsigned> count = 0;
        run_crew({.threads = threads, .nice = 1}, [&](const std::atomic<bool>&) { ++count; }, nothing);
        CHECK(count == threads);
    }
}

void exceptions_of_several_threads_give_one() {
    for (int round = 0; round < 50; ++round) {
        std::atomic<int> number = 0;
        try {
            run_crew({.threads = 6}, [&](const std::atomic<bool>&) { throw SystemFailure(++number, "work"); }, nothing);
            CHECK(false);
        } catch (const SystemFailure& failure) {
            CHECK(failure.code() >= 1 && failure.code() <= 6);
        }
        CHECK(number == 6);
    }
}

void one_exception_stops_the_others() {
    std::atomic<int> number = 0;
    const auto work = [&](const std::atomic<bool>& stop) {
        if (++number == 3) {
            throw ShortFile("the third");
        }
        until(stop);
    };
    CHECK_THROWS(ShortFile, run_crew({.threads = 4}, work, nothing));
}

void on_idle_that_throws_stops_all() {
    std::atomic<int> ended = 0;
    const auto work = [&](const std::atomic<bool>& stop) {
        until(stop);
        ++ended;
    };
    CHECK_THROWS(std::domain_error, run_crew({.threads = 3}, work, [] { throw std::domain_error("enough"); }));
    CHECK(ended == 3);
}

void first_cause_wins_over_what_it_causes() {
    const auto work = [&](const std::atomic<bool>& stop) {
        until(stop);
        throw SystemFailure(1, "interrupted by the stop");
    };
    CHECK_THROWS(std::domain_error, run_crew({.threads = 3}, work, [] { throw std::domain_error("enough"); }));
}

}  // namespace

int main() {
    all_threads_work_once();
    exceptions_of_several_threads_give_one();
    one_exception_stops_the_others();
    on_idle_that_throws_stops_all();
    first_cause_wins_over_what_it_causes();
}

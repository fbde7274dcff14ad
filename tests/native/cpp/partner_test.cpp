// Work that is shared is done once each, whether or not the partner is awake, and nobody is at it afterwards.
#include "partner.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <numeric>
#include <vector>

#include "check.hpp"

using namespace ftrain;

namespace {

constexpr std::size_t COUNT = 10000;

void each_piece_is_done_once() {
    Partner partner;
    std::atomic<int> in_progress = 0;
    std::atomic<int> together = 0;
    for (int round = 0; round < 300 || (together == 0 && round < 30000); ++round) {
        if (round % 3 != 0) {
            partner.expect();
        }
        if (round % 3 == 2) {
            std::this_thread::sleep_for(std::chrono::microseconds(100));  // it is awake by now
        }
        std::vector<int> done(COUNT, 0);  // each one written by one thread alone: a sanitizer tells
        CHECK(partner.share(COUNT, 128, [&](std::size_t begin, std::size_t end) {
            if (++in_progress == 2) {
                ++together;
            }
            for (std::size_t i = begin; i < end; ++i) {
                ++done[i];
            }
            --in_progress;
            return true;
        }));
        CHECK(in_progress == 0);
        CHECK(std::accumulate(done.begin(), done.end(), 0) == static_cast<int>(COUNT));
    }
    CHECK(together > 0);
}

void a_refusal_ends_it() {
    Partner partner;
    int ended_early = 0;
    for (int round = 0; round < 100; ++round) {
        partner.expect();
        std::atomic<std::size_t> calls = 0;
        CHECK(!partner.share(COUNT, 10, [&](std::size_t begin, std::size_t) { return ++calls, begin != 50; }));
        CHECK(calls >= 6);
        ended_early += calls < COUNT / 10 ? 1 : 0;  // not where the one that is refused is kept from saying so
        CHECK(partner.share(0, 10, [](std::size_t, std::size_t) { return false; }));
    }
    CHECK(ended_early > 0);
}

void a_child_of_a_fork_knows_that_it_is_alone() {
    Partner partner;
    CHECK(partner.is_here());
    const pid_t child = fork();
    if (child == 0) {
        _exit(partner.is_here() ? 1 : 0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
}

void one_that_is_never_asked_ends() {
    Partner idle;
    Partner expecting;
    expecting.expect();
}

}  // namespace

int main() {
    each_piece_is_done_once();
    a_refusal_ends_it();
    a_child_of_a_fork_knows_that_it_is_alone();
    one_that_is_never_asked_ends();
}

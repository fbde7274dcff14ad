// The control page, between threads that store, wait and wake.
#include "page.hpp"

#include <limits>
#include <stdexcept>
#include <thread>

#include "check.hpp"

using namespace ftrain;

namespace {

constexpr double FOR_EVER = std::numeric_limits<double>::infinity();
constexpr int ROUNDS = 2000;

void go_on() {}

void two_threads_take_turns() {
    const int fd = create_page("check");
    const Page here(fd);
    const Page there(fd);  // mapped twice, as by two processes
    close(fd);
    std::jthread other([&] {
        for (std::int64_t turn = 0; turn < ROUNDS; ++turn) {
            CHECK(there.wait(0, turn, FOR_EVER, go_on));
            there.store(1, turn + 1);
            there.wake(1);
        }
    });
    for (std::int64_t turn = 0; turn < ROUNDS; ++turn) {
        here.store(0, turn + 1);
        here.wake(0);
        CHECK(here.wait(1, turn, FOR_EVER, go_on));
        CHECK(here.load(1) == turn + 1);
    }
}

void every_addition_counts() {
    const int fd = create_page("check");
    const Page page(fd);
    close(fd);
    {
        std::vector<std::jthread> threads;
        for (int i = 0; i < 4; ++i) {
            threads.emplace_back([&] {
                for (int round = 0; round < ROUNDS; ++round) {
                    page.add(7, 3);
                }
            });
        }
    }
    CHECK(page.load(7) == 4 * 3 * ROUNDS);
    page.store(7, std::numeric_limits<std::int64_t>::max());
    CHECK(page.add(7, 1) == std::numeric_limits<std::int64_t>::min());
}

void waits_end_at_their_deadline() {
    const int fd = create_page("check");
    const Page page(fd);
    close(fd);
    CHECK(!page.wait(0, 0, 0.001, go_on));
    CHECK(!page.wait(0, 0, -1.0, go_on));
    CHECK(page.wait(0, 1, FOR_EVER, go_on));
    CHECK_THROWS(std::invalid_argument, page.wait(0, 0, std::numeric_limits<double>::quiet_NaN(), go_on));
}

void words_and_pages_that_do_not_exist_are_refused() {
    const int fd = create_page("check");
    const Page page(fd);
    close(fd);
    page.store(static_cast<std::ptrdiff_t>(PAGE_WORDS) - 1, 1);
    CHECK_THROWS(std::out_of_range, page.load(-1));
    CHECK_THROWS(std::out_of_range, page.store(static_cast<std::ptrdiff_t>(PAGE_WORDS), 1));
    CHECK_THROWS(SystemFailure, Page(-1));
    const check::TemporaryFile small(100);
    CHECK_THROWS(std::invalid_argument, Page(small.fd()));
}

}  // namespace

int main() {
    two_threads_take_turns();
    every_addition_counts();
    waits_end_at_their_deadline();
    words_and_pages_that_do_not_exist_are_refused();
}

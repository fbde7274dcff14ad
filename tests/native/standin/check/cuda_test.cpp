// Threads stage, upload, pin and drop at once, over the stand-in driver: for the sanitizers to watch.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "digest.hpp"
#include "plan.hpp"

namespace {

using namespace ftrain::cuda;

constexpr int THREADS = 4;
constexpr int ROUNDS = 40;
constexpr std::size_t SIZES[] = {1, 17, 4096, 70'001, 300'000, 0, 33};

void expect(bool fact, const char* what) {
    if (!fact) {
        std::fprintf(stderr, "%s\n", what);
        std::abort();
    }
}

std::size_t total() {
    std::size_t sum = 0;
    for (const std::size_t nbytes : SIZES) {
        sum += nbytes;
    }
    return sum;
}

// What goes up comes down, with a digest of it in between; plans, pins and tickets go in any order.
void round_trip(const std::shared_ptr<Stager>& stager, unsigned seed) {
    std::vector<unsigned char> sent(total()), received(total());
    for (std::size_t i = 0; i < sent.size(); ++i) {
        sent[i] = static_cast<unsigned char>(i * 31 + seed);
    }
    std::unique_ptr<DeviceMemory> device;
    {
        const Current current(stager->context());
        device = std::make_unique<DeviceMemory>(stager->context(), total());
    }
    std::vector<HostDeviceCopy> up, down;
    std::size_t at = 0;
    for (const std::size_t nbytes : SIZES) {
        up.push_back({reinterpret_cast<std::uintptr_t>(sent.data() + at), device->address() + at, nbytes});
        down.push_back({reinterpret_cast<std::uintptr_t>(received.data() + at), device->address() + at, nbytes});
        at += nbytes;
    }
    const auto source = stager->pin(reinterpret_cast<std::uintptr_t>(sent.data()), sent.size());
    const auto target = stager->pin(reinterpret_cast<std::uintptr_t>(received.data()), received.size());
    std::make_shared<Plan>(stager, up, Direction::TO_DEVICE)->begin(nullptr);  // dropped: complete
    const DeviceRange all{device->address(), total()};
    const auto digest = digest_of_device(*stager, {&all, 1}, nullptr);
    expect(digest.at(0) == digest_of_host(sent.data(), sent.size()), "another digest");
    auto plan = std::make_shared<Plan>(stager, down, Direction::TO_HOST);
    auto ticket = plan->begin(nullptr);
    plan.reset();
    ticket->order(nullptr);
    if (seed % 3 == 0) {
        ticket->wait();
    } else if (seed % 3 == 1) {
        while (!ticket->done()) {
        }
    }
    ticket.reset();
    expect(std::memcmp(sent.data(), received.data(), sent.size()) == 0, "other bytes came back");
    stager->unpin(*source);
    stager->unpin(*target);
}

}  // namespace

int main() {
    expect(probe().usable, probe().reason.c_str());
    auto stager = std::make_shared<Stager>(0, std::vector<std::string>{std::getenv("FTRAIN_LIBCUDA")});
    std::vector<std::jthread> threads;
    std::atomic<unsigned> seed{0};
    for (int i = 0; i < THREADS; ++i) {
        threads.emplace_back([&] {
            for (int round = 0; round < ROUNDS; ++round) {
                round_trip(stager, seed++);
            }
        });
    }
    threads.clear();
    return 0;
}

// Checksums: both ways of computing them, and those of ranges from those of their parts.
#include "crc32c.hpp"

#include <algorithm>
#include <thread>

#include "check.hpp"
#include "sums.hpp"

using namespace ftrain;
using check::Bytes;

namespace {

void both_ways_agree_at_every_size_and_alignment() {
    const Bytes data = check::bytes_of(60'000, 1);
    for (const std::size_t nbytes : {0, 1, 7, 8, 9, 767, 768, 769, 4096, 24'575, 24'576, 24'577, 50'000}) {
        for (std::size_t start = 0; start < 9; ++start) {
            CHECK(crc32c(data.data() + start, nbytes, 5) == crc32c_software(data.data() + start, nbytes, 5));
        }
    }
    CHECK(crc32c("123456789", 9, 0) == 0xE3069283U);
}

void joined_parts_give_the_sum_of_the_whole() {
    const Bytes data = check::bytes_of(100'000, 2);
    Joiner joiner;
    for (std::size_t cut = 0; cut <= data.size(); cut += 997) {
        const std::uint32_t first = crc32c(data.data(), cut, 0);
        const std::uint32_t second = crc32c(data.data() + cut, data.size() - cut, 0);
        CHECK(joiner.join(first, second, data.size() - cut) == crc32c(data.data(), data.size(), 0));
    }
}

void copies_are_summed_as_they_are_made() {
    const Bytes source = check::bytes_of(100'000, 3);
    for (const std::size_t nbytes : {0, 1, 4095, 4096, 16'384, 16'385, 99'990}) {
        for (std::size_t start = 0; start < 3; ++start) {
            Bytes target(nbytes + 1);
            CHECK(copy_summed(target.data(), source.data() + start, nbytes) == crc32c(source.data() + start, nbytes, 0));
            CHECK(std::equal(source.begin() + static_cast<std::ptrdiff_t>(start),
                             source.begin() + static_cast<std::ptrdiff_t>(start + nbytes), target.begin()));
            CHECK(target.back() == std::byte{0});
        }
    }
}

void first_use_is_in_several_threads_at_once() {
    const Bytes data = check::bytes_of(50'000, 4);
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] { CHECK(crc32c(data.data(), data.size(), 0) == crc32c_software(data.data(), data.size(), 0)); });
    }
}

}  // namespace

int main() {
    first_use_is_in_several_threads_at_once();
    both_ways_agree_at_every_size_and_alignment();
    joined_parts_give_the_sum_of_the_whole();
    copies_are_summed_as_they_are_made();
}

// The control page: 64-bit words that two processes share and read without a lock. docs/protocol.md says what they mean.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "failure.hpp"
#include "mapping.hpp"
#include "memory.hpp"

namespace ftrain {

constexpr std::size_t PAGE_WORDS = PAGE_BYTES / sizeof(std::int64_t);

// Makes the memory of a page, all zero, close-on-exec, of a size nobody can change, and returns its descriptor.
int create_page(const std::string& name);

class Page {
public:
    explicit Page(int fd) : mapping_(fd, PAGE_BYTES) {}

    // Each is sequentially consistent: of two processes that each store one word and then load the other's, at
    // least one sees the other's store.
    std::int64_t load(std::ptrdiff_t index) const;
    void store(std::ptrdiff_t index, std::int64_t value) const;
    std::int64_t add(std::ptrdiff_t index, std::int64_t amount) const;  // returns the new value

    // Sleeps while the word is `expected`. True once it is not, false at the deadline. An infinite timeout never ends.
    bool wait(std::ptrdiff_t index, std::int64_t expected, double timeout_seconds, OnInterrupt on_interrupt) const;

    // Wakes everyone, in every process, who waits on the word: to be called after its store.
    void wake(std::ptrdiff_t index) const;

private:
    std::int64_t& word(std::ptrdiff_t index) const;
    std::uint32_t* futex(std::ptrdiff_t index) const;

    Mapping mapping_;
};

}  // namespace ftrain

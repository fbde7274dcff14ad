// Page-aligned memory of this process alone: what direct I/O goes through where the bytes lie elsewhere.
#pragma once

#include <cstddef>

namespace ftrain {

constexpr std::size_t PAGE_BYTES = 4096;

// Anonymous memory, given back at the end. Neither copied nor moved: transfers in flight know its address.
class Buffers {
public:
    // `count` buffers of `nbytes` each, which is a multiple of PAGE_BYTES. Throws SystemFailure.
    Buffers(std::size_t count, std::size_t nbytes);
    ~Buffers();
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;

    std::byte* at(std::size_t index) const noexcept { return data_ + index * nbytes_; }

private:
    std::byte* data_ = nullptr;
    std::size_t nbytes_;
    std::size_t mapped_bytes_;
};

}  // namespace ftrain

// Whole reads and writes between memory and a file. With O_DIRECT on the descriptor these are DMA, no page cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "failure.hpp"

namespace ftrain {

// Writes all of it or throws SystemFailure, whatever the kernel takes at a time.
void write_from(int fd, std::uintptr_t address, std::size_t nbytes, std::uint64_t offset, OnInterrupt on_interrupt);

// Reads all of it or throws: SystemFailure, or ShortFile where the file ends before.
void read_into(int fd, std::uintptr_t address, std::size_t nbytes, std::uint64_t offset, OnInterrupt on_interrupt);

}  // namespace ftrain

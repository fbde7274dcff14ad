#include "memory.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <limits>
#include <new>
#include <string>

#include "failure.hpp"

namespace ftrain {

Buffers::Buffers(std::size_t count, std::size_t nbytes) : nbytes_(nbytes), mapped_bytes_(count * nbytes) {
    if (nbytes != 0 && count > std::numeric_limits<std::size_t>::max() / nbytes) {
        throw std::bad_array_new_length();
    }
    if (mapped_bytes_ == 0) {
        return;
    }
    void* found = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) {
        throw SystemFailure(errno, "mmap of " + std::to_string(mapped_bytes_) + " bytes for buffers");
    }
    madvise(found, mapped_bytes_, MADV_HUGEPAGE);  // fewer faults; where it is refused, more of them
    // A page that is shared with a forked child may be copied under a direct read: what the disk sends goes to the other copy.
    madvise(found, mapped_bytes_, MADV_DONTFORK);
    data_ = static_cast<std::byte*>(found);
}

Buffers::~Buffers() {
    if (data_ != nullptr) {
        munmap(data_, mapped_bytes_);
    }
}

}  // namespace ftrain

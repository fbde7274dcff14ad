// A copy that leaves the caches to those who need them: what is copied here is next read by a device or another process.
#pragma once

#include <cstddef>

namespace ftrain {

// As memcpy, but large ranges are stored past the caches where the CPU can do that. Complete, for all threads, on return.
void stream_copy(void* to, const void* from, std::size_t nbytes);

}  // namespace ftrain

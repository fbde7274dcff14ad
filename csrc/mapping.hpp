// Shared memory: a memfd, and its pages in this process.
#pragma once

#include <cstddef>
#include <string>

namespace ftrain {

// Makes an anonymous file in memory, close-on-exec, of zero bytes, and returns its descriptor.
// huge_pages asks for pages of the system's pool (hugetlbfs) and fails where there is none.
int memory_file(const std::string& name, bool huge_pages);

// The first `nbytes` of a file, mapped shared and writable. Neither copied nor moved: its address is its identity.
class Mapping {
public:
    Mapping(int fd, std::size_t nbytes);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    // Maps the pages of a part now, which begins on one, so that nobody waits for them later.
    void populate(std::size_t offset, std::size_t nbytes) const;

    std::byte* data() const noexcept { return data_; }
    std::size_t nbytes() const noexcept { return nbytes_; }

private:
    std::byte* data_;
    std::size_t nbytes_;
};

}  // namespace ftrain

#include "mapping.hpp"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <stdexcept>

#include "failure.hpp"

namespace ftrain {

namespace {

constexpr std::size_t HUGE_PAGE_BYTES = std::size_t{2} << 20;

std::size_t file_bytes(int fd) {
    struct stat status {};
    if (fstat(fd, &status) != 0) {
        throw SystemFailure(errno, "fstat of fd " + std::to_string(fd) + " before mapping it");
    }
    return static_cast<std::size_t>(status.st_size);
}

}  // namespace

int memory_file(const std::string& name, bool huge_pages) {
    const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge_pages ? MFD_HUGETLB : 0U);
    const int fd = memfd_create(name.c_str(), flags);
    if (fd < 0) {
        throw SystemFailure(errno, "memfd_create of '" + name + "'" + (huge_pages ? " with huge pages" : ""));
    }
    return fd;
}

Mapping::Mapping(int fd, std::size_t nbytes) : data_(nullptr), nbytes_(nbytes) {
    if (nbytes == 0) {
        throw std::invalid_argument("a mapping needs at least one byte");
    }
    // Touching a page beyond the end of the file is a SIGBUS later; here it is an error that can be read.
    if (const std::size_t held = file_bytes(fd); held < nbytes) {
        throw std::invalid_argument("fd " + std::to_string(fd) + " holds " + std::to_string(held) + " bytes, cannot map " +
                                    std::to_string(nbytes) + ": size it with os.ftruncate first");
    }
    void* address = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) {
        throw SystemFailure(errno, "mmap of " + std::to_string(nbytes) + " bytes of fd " + std::to_string(fd));
    }
    data_ = static_cast<std::byte*>(address);
    if (nbytes >= HUGE_PAGE_BYTES) {
        // A hint: systems that allow huge pages in shared memory save faults, the others refuse it, and both are right.
        (void)madvise(address, nbytes, MADV_HUGEPAGE);
    }
}

void Mapping::populate(std::size_t offset, std::size_t nbytes) const {
    if (offset > nbytes_ || nbytes > nbytes_ - offset) {
        throw std::invalid_argument("cannot populate beyond the mapping");
    }
#ifdef MADV_POPULATE_WRITE
    // A kernel before 5.14 refuses it; then pages are mapped as they are first touched.
    (void)madvise(data_ + offset, nbytes, MADV_POPULATE_WRITE);
#endif
}

Mapping::~Mapping() {
    munmap(data_, nbytes_);
}

}  // namespace ftrain

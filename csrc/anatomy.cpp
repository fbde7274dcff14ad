#include "anatomy.hpp"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>

namespace ftrain {

namespace {

constexpr std::size_t MEMBERS_END = 128;  // of an implementation: it has more than that
constexpr std::size_t COUNTER_END = 32;
constexpr std::size_t WORD_BYTES = sizeof(std::uint64_t);

// Through the kernel, which says so where there is no such memory.
template <class Value>
std::optional<Value> peek(std::uintptr_t address) {
    Value value{};
    const iovec here{&value, sizeof value};
    const iovec there{reinterpret_cast<void*>(address), sizeof value};  // NOLINT(performance-no-int-to-ptr)
    if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != static_cast<ssize_t>(sizeof value)) {
        return std::nullopt;
    }
    return value;
}

template <class Fits>
bool fits_all(std::span<const Specimen> specimens, Fits fits) {
    return !specimens.empty() && std::all_of(specimens.begin(), specimens.end(), fits);
}

}  // namespace

std::optional<Anatomy> dissect(std::span<const Specimen> specimens) {
    std::optional<Anatomy> found;
    std::size_t implementation = Anatomy::FIRST_MEMBER;
    const auto points_to_it = [&](const Specimen& one) {
        return implementation + WORD_BYTES <= one.object_bytes &&
               peek<std::uint64_t>(one.object + implementation) == one.implementation;
    };
    while (!fits_all(specimens, points_to_it)) {
        implementation += WORD_BYTES;
        if (implementation >= MEMBERS_END) {
            return std::nullopt;
        }
    }
    for (std::size_t counter = Anatomy::FIRST_MEMBER; counter < MEMBERS_END; counter += WORD_BYTES) {
        for (std::size_t version = 0; version < COUNTER_END; version += sizeof(std::uint32_t)) {
            const bool fits = fits_all(specimens, [&](const Specimen& one) {
                const auto address = peek<std::uint64_t>(one.implementation + counter);
                return address.has_value() && *address != 0 && *address % WORD_BYTES == 0 &&
                       peek<std::uint32_t>(*address + version) == one.version;
            });
            if (fits && found.has_value()) {
                return std::nullopt;
            }
            if (fits) {
                found = Anatomy{implementation, counter, version};
            }
        }
    }
    return found;
}

}  // namespace ftrain

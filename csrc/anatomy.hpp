// Where torch keeps what a look at a tensor needs, found out by examining some tensors, not assumed: its headers are not ours.
//
// A Python tensor points to an implementation, that to a version counter which the views of one memory share. Reading it there
// takes a tenth of what asking the Python attribute does. Where it cannot be found, the attribute is asked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace ftrain {

// Offsets in bytes.
struct Anatomy {
    std::size_t implementation;  // in the Python object: the address of the implementation
    std::size_t counter;         // in the implementation: the address of its version counter, 0 where it counts nothing
    std::size_t version;         // in the counter, 32 bits

    std::uintptr_t implementation_of(const void* object) const {
        return word(reinterpret_cast<std::uintptr_t>(object) + implementation);
    }
    std::uintptr_t counter_of(std::uintptr_t of) const { return word(of + counter); }
    std::uint32_t version_of(std::uintptr_t counter_address) const {
        return __atomic_load_n(reinterpret_cast<const std::uint32_t*>(counter_address + version), __ATOMIC_RELAXED);
    }

    // A digest of what tells which memory and which counter the implementation has: equal for other contents.
    std::uint64_t identity_of(std::uintptr_t of) const {
        std::uint64_t digest = 0;
        for (std::size_t at = FIRST_MEMBER; at <= counter; at += sizeof(std::uint64_t)) {
            digest = (digest ^ word(of + at)) * 0x9e3779b97f4a7c15U;
            digest ^= digest >> 32U;
        }
        return digest;
    }

    static constexpr std::size_t FIRST_MEMBER = 16;  // of both: a table or type and the count of references come before

private:
    static std::uint64_t word(std::uintptr_t address) {
        return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(address), __ATOMIC_RELAXED);
    }
};

// A living tensor, and what Python says of it.
struct Specimen {
    std::uintptr_t object;
    std::size_t object_bytes;
    std::uintptr_t implementation;
    std::uint32_t version;
};

// The only anatomy that fits all specimens, whose versions should differ; none where several do. Reads no memory that is not there.
std::optional<Anatomy> dissect(std::span<const Specimen> specimens);

}  // namespace ftrain

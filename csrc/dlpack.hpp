// The part of DLPack's C interface (version 1, https://dmlc.github.io/dlpack) that says where a Python tensor is. It is the
// same for every library that offers it; torch does as torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace ftrain::dlpack {

constexpr const char* CAPSULE = "dlpack_exchange_api";
constexpr std::uint32_t MAJOR = 1;  // another one has other structures
constexpr std::int32_t CPU = 1;
constexpr std::uint8_t COMPLEX = 5;

struct Device {
    std::int32_t type;
    std::int32_t number;
    bool operator==(const Device&) const = default;
};

struct DataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
    bool operator==(const DataType&) const = default;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t dimensions;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct Exchange {
    std::uint32_t major;
    std::uint32_t minor;
    void* older;
    void* allocate;
    void* managed_from_python;
    void* managed_to_python;
    // Describes a tensor of the type that the exchange belongs to, for as long as that lives and is not changed. Returns 0, or
    // -1 with a Python exception set.
    int (*from_python)(void* object, Tensor* out);
    void* current_stream;
};

}  // namespace ftrain::dlpack

// Small memory in pairs, pinned on the host and on the device, in which tables travel to kernels.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "context.hpp"

namespace ftrain::cuda {

class HostMemory {
public:
    HostMemory(const Context& context, std::size_t nbytes);
    ~HostMemory();
    HostMemory(const HostMemory&) = delete;
    HostMemory& operator=(const HostMemory&) = delete;

    void* data() const noexcept { return data_; }

private:
    const Context& context_;
    void* data_ = nullptr;
};

class DeviceMemory {
public:
    DeviceMemory(const Context& context, std::size_t nbytes);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    DeviceAddress address() const noexcept { return address_; }

private:
    const Context& context_;
    DeviceAddress address_ = 0;
};

class Scratch {
public:
    Scratch(const Context& context, std::size_t nbytes) : nbytes_(nbytes), host_(context, nbytes), device_(context, nbytes) {}

    std::size_t nbytes() const noexcept { return nbytes_; }
    template <class T>
    T* host() const noexcept {
        return static_cast<T*>(host_.data());
    }
    DeviceAddress device() const noexcept { return device_.address(); }

private:
    std::size_t nbytes_;
    HostMemory host_;
    DeviceMemory device_;
};

// Scratch to be used again: freeing device memory waits for all of the device's work, training included.
class ScratchPool {
public:
    explicit ScratchPool(const Context& context) : context_(context) {}

    std::unique_ptr<Scratch> take(std::size_t nbytes);
    // Nothing may be in flight on it any more.
    void give(std::unique_ptr<Scratch> scratch) noexcept;

private:
    static constexpr std::size_t KEPT_MAX = 16;
    static constexpr std::size_t NBYTES_MIN = 4096;

    const Context& context_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Scratch>> free_;
};

}  // namespace ftrain::cuda

// kernels.cu on one device, ready to launch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "context.hpp"

namespace ftrain::cuda {

class Kernels {
public:
    // Compiles and loads them. Throws Failure where there is no NVRTC, or it or the driver refuses. The context is current.
    Kernels(const Context& context, const std::vector<std::string>& nvrtc_libraries);
    ~Kernels();
    Kernels(const Kernels&) = delete;
    Kernels& operator=(const Kernels&) = delete;

    // Each runs over a table of `count` tiles in device memory (tiles.hpp), in the stream's order.
    void gather(DeviceAddress tiles, std::uint64_t count, StreamHandle stream) const;
    void scatter(DeviceAddress tiles, std::uint64_t count, StreamHandle stream) const;
    void digest(DeviceAddress tiles, std::uint64_t count, DeviceAddress sums, StreamHandle stream) const;

private:
    FunctionHandle find(const char* name) const;
    void launch(FunctionHandle function, std::uint64_t count, StreamHandle stream, void** parameters) const;
    void unload() noexcept;

    const Context& context_;
    ModuleHandle module_ = nullptr;
    FunctionHandle gather_ = nullptr;
    FunctionHandle scatter_ = nullptr;
    FunctionHandle digest_ = nullptr;
};

}  // namespace ftrain::cuda

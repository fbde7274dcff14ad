#include "kernels.hpp"

#include <algorithm>

#include "nvrtc.hpp"

namespace ftrain::cuda {

namespace {

// Enough to fill the bus and no more: the multiprocessors are for training.
constexpr std::uint64_t BLOCKS_MAX = 32;
constexpr unsigned BLOCK_THREADS = 256;

}  // namespace

Kernels::Kernels(const Context& context, const std::vector<std::string>& nvrtc_libraries) : context_(context) {
    const int major = context.attribute(CAPABILITY_MAJOR, "compute capability");
    const int minor = context.attribute(CAPABILITY_MINOR, "compute capability");
    const std::vector<char> code = compile_kernels(major, minor, nvrtc_libraries);
    context.check(context.call().cuModuleLoadData(&module_, code.data()), "loading the kernels");
    try {
        gather_ = find("ftrain_gather");
        scatter_ = find("ftrain_scatter");
        digest_ = find("ftrain_digest");
    } catch (...) {
        unload();
        throw;
    }
}

Kernels::~Kernels() {
    unload();
}

void Kernels::unload() noexcept {
    quietly(context_, [this](const Table& call) { call.cuModuleUnload(module_); });
}

FunctionHandle Kernels::find(const char* name) const {
    FunctionHandle function = nullptr;
    context_.check(context_.call().cuModuleGetFunction(&function, module_, name), "finding a kernel");
    return function;
}

void Kernels::launch(FunctionHandle function, std::uint64_t count, StreamHandle stream, void** parameters) const {
    const auto blocks = static_cast<unsigned>(std::min(count, BLOCKS_MAX));
    context_.check(
        context_.call().cuLaunchKernel(function, blocks, 1, 1, BLOCK_THREADS, 1, 1, 0, stream, parameters, nullptr),
        "launching a kernel");
}

void Kernels::gather(DeviceAddress tiles, std::uint64_t count, StreamHandle stream) const {
    void* parameters[] = {&tiles, &count};
    launch(gather_, count, stream, parameters);
}

void Kernels::scatter(DeviceAddress tiles, std::uint64_t count, StreamHandle stream) const {
    void* parameters[] = {&tiles, &count};
    launch(scatter_, count, stream, parameters);
}

void Kernels::digest(DeviceAddress tiles, std::uint64_t count, DeviceAddress sums, StreamHandle stream) const {
    void* parameters[] = {&tiles, &count, &sums};
    launch(digest_, count, stream, parameters);
}

}  // namespace ftrain::cuda

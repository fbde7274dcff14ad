// NVRTC, NVIDIA's compiler as a library: loaded at run time, from wherever the caller knows it to be.
#pragma once

#include <string>
#include <vector>

namespace ftrain::cuda {

// The machine code of ftrain's kernels for devices of this compute capability, by the first of the libraries (paths, or
// names that the loader knows) that can be loaded. Throws Failure with the compiler's own words. Needs no GPU.
std::vector<char> compile_kernels(int major, int minor, const std::vector<std::string>& libraries);

}  // namespace ftrain::cuda

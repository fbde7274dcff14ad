// The real kernels, run on the CPU: one thread after the other, which they allow.
#pragma once

#include <functional>

#include "machine.hpp"

namespace standin {

// The operation of launching a kernel of that name with these parameters, as cuLaunchKernel takes them.
// `step` reads the tables when it runs, and notes a violation where they lead out of memory.
Operation kernel_operation(const std::string& name, unsigned blocks, unsigned threads, void** parameters);

}  // namespace standin

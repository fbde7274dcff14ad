// A compiler that makes no code: its "cubin" is text, which this driver's cuModuleLoadData knows.
#include <cstring>
#include <mutex>
#include <string>

#include "faults.hpp"
#include "machine.hpp"

namespace {

constexpr char CODE[] = "kernels: run by the stand-in";
constexpr char LOG[] = "kernels.cu(1): error: as the test wanted\n";
constexpr int COMPILATION = 6, INVALID_INPUT = 3;

int use(const char* name) {
    const std::lock_guard lock(standin::machine().mutex);
    return standin::faults().use(name);
}

}  // namespace

extern "C" {

int nvrtcCreateProgram(std::string** program, const char* source, const char*, int, const char* const*,
                       const char* const*) {
    if (const int fault = use("nvrtcCreateProgram")) return fault;
    *program = new std::string(source);
    return 0;
}

int nvrtcCompileProgram(std::string* program, int count, const char* const* options) {
    if (const int fault = use("nvrtcCompileProgram")) return fault;
    if (count < 1 || std::strcmp(options[0], "--gpu-architecture=sm_90") != 0) return INVALID_INPUT;
    for (const char* kernel : {"ftrain_gather(", "ftrain_scatter(", "ftrain_digest("}) {
        if (program->find(kernel) == std::string::npos) return COMPILATION;
    }
    return 0;
}

int nvrtcDestroyProgram(std::string** program) {
    use("nvrtcDestroyProgram");
    delete *program;
    *program = nullptr;
    return 0;
}

int nvrtcGetProgramLogSize(std::string*, std::size_t* nbytes) {
    *nbytes = sizeof LOG;
    return use("nvrtcGetProgramLogSize");
}

int nvrtcGetProgramLog(std::string*, char* text) {
    std::memcpy(text, LOG, sizeof LOG);
    return use("nvrtcGetProgramLog");
}

int nvrtcGetCUBINSize(std::string*, std::size_t* nbytes) {
    *nbytes = sizeof CODE;
    return use("nvrtcGetCUBINSize");
}

int nvrtcGetCUBIN(std::string*, char* code) {
    std::memcpy(code, CODE, sizeof CODE);
    return use("nvrtcGetCUBIN");
}

}  // extern "C"

#include "nvrtc.hpp"

#include <dlfcn.h>

#include <cstddef>
#include <filesystem>
#include <string_view>
#include <system_error>

#include "driver.hpp"
#include "kernel_source.hpp"

namespace ftrain::cuda {

namespace {

using Program = struct ProgramOpaque*;

#define FTRAIN_NVRTC(X)                                                                                          \
    X(nvrtcCreateProgram, Program*, const char*, const char*, int, const char* const*, const char* const*)       \
    X(nvrtcCompileProgram, Program, int, const char* const*)                                                     \
    X(nvrtcDestroyProgram, Program*)                                                                             \
    X(nvrtcGetProgramLogSize, Program, std::size_t*)                                                             \
    X(nvrtcGetProgramLog, Program, char*)                                                                        \
    X(nvrtcGetCUBINSize, Program, std::size_t*)                                                                  \
    X(nvrtcGetCUBIN, Program, char*)

// NVRTC opens its second half by name alone, which fails in folders that the loader does not search, such as pip's:
// once loaded from there, it is found by that name.
void load_builtins_beside(const std::string& path) {
    if (path.find('/') == std::string::npos) {
        return;
    }
    namespace fs = std::filesystem;
    std::error_code unreadable;
    fs::directory_iterator entry(fs::path(path).parent_path(), unreadable);
    for (; !unreadable && entry != fs::directory_iterator(); entry.increment(unreadable)) {
        if (entry->path().filename().string().starts_with("libnvrtc-builtins.so")) {
            dlopen(entry->path().c_str(), RTLD_NOW | RTLD_LOCAL);
        }
    }
}

class Compiler {
public:
    explicit Compiler(const std::vector<std::string>& libraries) {
        void* library = nullptr;
        std::string tried;
        for (const std::string& path : libraries) {
            library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never unloaded: torch uses the same one
            if (library != nullptr) {
                load_builtins_beside(path);
                path_ = path;
                break;
            }
            tried += (tried.empty() ? "" : ", ") + path;
        }
        if (library == nullptr) {
            throw Failure("there is no NVRTC to compile kernels with; looked for " + (tried.empty() ? "none" : tried));
        }
#define FTRAIN_NVRTC_FIND(name, ...)                                                                             \
    name.pointer = reinterpret_cast<decltype(name.pointer)>(dlsym(library, #name));                              \
    if (!name) {                                                                                                 \
        throw Failure("NVRTC (" + path_ + ") is too old: it has no function " #name);                            \
    }
        FTRAIN_NVRTC(FTRAIN_NVRTC_FIND)
#undef FTRAIN_NVRTC_FIND
    }

#define FTRAIN_NVRTC_MEMBER(name, ...) Function<__VA_ARGS__> name{#name, nullptr};
    FTRAIN_NVRTC(FTRAIN_NVRTC_MEMBER)
#undef FTRAIN_NVRTC_MEMBER

    void check(Outcome outcome, const std::string& log = "") const {
        if (outcome.result != SUCCESS) {
            throw Failure("compiling kernels with " + path_ + ": " + outcome.call + " failed with nvrtcResult " +
                          std::to_string(outcome.result) + (log.empty() ? "" : ": " + log));
        }
    }

private:
    std::string path_;
};

class Source {
public:
    explicit Source(const Compiler& compiler) : compiler_(compiler) {
        compiler.check(
            compiler.nvrtcCreateProgram(&program_, KERNEL_SOURCE, "ftrain/kernels.cu", 0, nullptr, nullptr));
    }
    ~Source() { compiler_.nvrtcDestroyProgram(&program_); }
    Source(const Source&) = delete;
    Source& operator=(const Source&) = delete;

    void compile(const std::string& architecture) {
        const char* options[] = {architecture.c_str(), "--std=c++17"};
        const Outcome outcome = compiler_.nvrtcCompileProgram(program_, 2, options);
        compiler_.check(outcome, outcome.result != SUCCESS ? log() : "");
    }

    std::vector<char> code() const {
        std::size_t nbytes = 0;
        compiler_.check(compiler_.nvrtcGetCUBINSize(program_, &nbytes));
        std::vector<char> code(nbytes);
        compiler_.check(compiler_.nvrtcGetCUBIN(program_, code.data()));
        return code;
    }

private:
    std::string log() const {
        std::size_t nbytes = 0;
        if (compiler_.nvrtcGetProgramLogSize(program_, &nbytes).result != SUCCESS || nbytes < 2) {
            return "";
        }
        std::string text(nbytes, '\0');
        compiler_.nvrtcGetProgramLog(program_, text.data());
        text.resize(text.find_last_not_of(std::string_view("\0\n ", 3)) + 1);
        return text;
    }

    const Compiler& compiler_;
    Program program_ = nullptr;
};

}  // namespace

std::vector<char> compile_kernels(int major, int minor, const std::vector<std::string>& libraries) {
    const Compiler compiler(libraries);
    Source source(compiler);
    source.compile("--gpu-architecture=sm_" + std::to_string(major) + std::to_string(minor));
    return source.code();
}

}  // namespace ftrain::cuda

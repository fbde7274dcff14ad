// What the files that know Python (module.cpp, bind_*.cpp) share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace ftrain {

// A contiguous buffer of any exporter, held for as long as its bytes are read.
class Buffer {
public:
    explicit Buffer(nanobind::handle exporter) {
        if (PyObject_GetBuffer(exporter.ptr(), &view_, PyBUF_SIMPLE) != 0) {
            throw nanobind::python_error();
        }
    }
    ~Buffer() { PyBuffer_Release(&view_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    const void* data() const { return view_.buf; }
    std::size_t nbytes() const { return static_cast<std::size_t>(view_.len); }
    std::size_t item_bytes() const { return static_cast<std::size_t>(view_.itemsize); }

    // As 64-bit words, such as those of array("Q").
    std::span<const std::uint64_t> words() const {
        return {static_cast<const std::uint64_t*>(view_.buf), nbytes() / sizeof(std::uint64_t)};
    }

private:
    Py_buffer view_{};
};

// To be called without the GIL when a system call was interrupted: throws what a signal handler raised.
void run_signal_handlers();

void bind_columns(nanobind::module_& m);
void bind_cuda(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_fence(nanobind::module_& m);
void bind_look(nanobind::module_& m);

}  // namespace ftrain

// ftrain._native. Only this file and bind_*.cpp know Python: they take the GIL off, keep memory alive, and name the errors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "copy.hpp"
#include "courtesy.hpp"
#include "crc32c.hpp"
#include "failure.hpp"
#include "gloo_waits.hpp"
#include "mapping.hpp"
#include "page.hpp"
#include "process.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace ftrain {

void run_signal_handlers() {
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
        throw nb::python_error();
    }
}

}  // namespace ftrain

namespace {

using ftrain::Buffer;
using ftrain::run_signal_handlers;

// OSError(errno, text) picks its own subclass: FileNotFoundError, PermissionError and so on.
void set_os_error(int code, const std::string& attempt) {
    nb::object arguments = nb::make_tuple(code, attempt + ": " + std::strerror(code));
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

void translate_failure(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const ftrain::SystemFailure& failure) {
        set_os_error(failure.code(), failure.what());
    } catch (const std::system_error& failure) {
        set_os_error(failure.code().value(), "starting a thread");
    } catch (const ftrain::ShortFile& failure) {
        PyErr_SetString(PyExc_EOFError, failure.what());
    }
}

// A page that can be closed while another thread waits on it: the memory goes with the last user.
class ControlPage {
public:
    explicit ControlPage(int fd) : page_(std::make_shared<ftrain::Page>(fd)) {}

    std::int64_t load(std::ptrdiff_t index) const { return open().load(index); }
    void store(std::ptrdiff_t index, std::int64_t value) const { open().store(index, value); }
    std::int64_t add(std::ptrdiff_t index, std::int64_t amount) const { return open().add(index, amount); }
    void wake(std::ptrdiff_t index) const { open().wake(index); }
    void close() { page_.reset(); }

    bool wait(std::ptrdiff_t index, std::int64_t expected, double timeout_seconds) const {
        open();
        const std::shared_ptr<ftrain::Page> page = page_;
        nb::gil_scoped_release no_gil;
        return page->wait(index, expected, timeout_seconds, run_signal_handlers);
    }

private:
    const ftrain::Page& open() const {
        if (!page_) {
            throw std::invalid_argument("the control page is closed");
        }
        return *page_;
    }

    std::shared_ptr<ftrain::Page> page_;
};

// Shared memory that exports buffers, and stays mapped while one of them is alive.
class Memory {
public:
    Memory(int fd, std::size_t nbytes) : mapping_(std::make_unique<ftrain::Mapping>(fd, nbytes)) {}

    std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(open().data()); }
    std::size_t nbytes() const { return open().nbytes(); }

    void close() {
        if (exports_ != 0) {
            PyErr_Format(PyExc_BufferError, "cannot unmap: %zd view(s) of the mapping are in use", exports_);
            throw nb::python_error();
        }
        mapping_.reset();
    }

    const ftrain::Mapping& open() const {
        if (!mapping_) {
            throw std::invalid_argument("the mapping is closed");
        }
        return *mapping_;
    }

    void populate(std::size_t offset, std::size_t nbytes) const {
        const ftrain::Mapping& mapping = open();
        nb::gil_scoped_release no_gil;
        mapping.populate(offset, nbytes);
    }

    bool is_open() const { return mapping_ != nullptr; }
    void exported() { ++exports_; }
    void released() { --exports_; }

private:
    std::unique_ptr<ftrain::Mapping> mapping_;
    Py_ssize_t exports_ = 0;
};

int memory_get_buffer(PyObject* self, Py_buffer* view, int flags) {
    Memory* memory = nb::inst_ptr<Memory>(self);
    if (!memory->is_open()) {
        view->obj = nullptr;
        PyErr_SetString(PyExc_ValueError, "the mapping is closed");
        return -1;
    }
    const ftrain::Mapping& mapping = memory->open();
    const int rc = PyBuffer_FillInfo(view, self, mapping.data(), static_cast<Py_ssize_t>(mapping.nbytes()), 0, flags);
    if (rc == 0) {
        memory->exported();
    }
    return rc;
}

void memory_release_buffer(PyObject* self, Py_buffer*) {
    nb::inst_ptr<Memory>(self)->released();
}

PyType_Slot memory_slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(memory_get_buffer)},
    {Py_bf_releasebuffer, reinterpret_cast<void*>(memory_release_buffer)},
    {0, nullptr},
};

nb::object memory_view(nb::handle self) {
    return nb::steal(nb::detail::raise_if_null(PyMemoryView_FromObject(self.ptr())));
}

const void* bytes_at(std::uintptr_t address, std::size_t nbytes) {
    if (address == 0 && nbytes != 0) {
        throw std::invalid_argument("a null address was given for " + std::to_string(nbytes) + " bytes");
    }
    return reinterpret_cast<const void*>(address);
}

std::uint32_t crc32c(nb::handle exporter, std::uint32_t value) {
    const Buffer buffer(exporter);
    nb::gil_scoped_release no_gil;
    return ftrain::crc32c(buffer.data(), buffer.nbytes(), value);
}

std::uint32_t crc32c_address(std::uintptr_t address, std::size_t nbytes, std::uint32_t value) {
    const void* data = bytes_at(address, nbytes);
    nb::gil_scoped_release no_gil;
    return ftrain::crc32c(data, nbytes, value);
}

void copy_batch(const std::vector<std::tuple<std::uintptr_t, std::uintptr_t, std::size_t>>& pairs, unsigned threads) {
    nb::gil_scoped_release no_gil;
    std::vector<ftrain::Copy> copies;
    copies.reserve(pairs.size());
    for (const auto& [to, from, nbytes] : pairs) {
        copies.push_back({to, from, nbytes});
    }
    ftrain::copy_batch(copies, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    // Pages and mappings live as long as the process that uses them: alive at exit is not leaked.
    nb::set_leak_warnings(false);
    nb::register_exception_translator(translate_failure);

    nb::class_<ControlPage>(m, "ControlPage")
        .def(nb::init<int>(), "fd"_a)
        .def_static("create", &ftrain::create_page, "name"_a)
        .def("load", &ControlPage::load, "index"_a)
        .def("store", &ControlPage::store, "index"_a, "value"_a)
        .def("add", &ControlPage::add, "index"_a, "amount"_a)
        .def("wait", &ControlPage::wait, "index"_a, "expected"_a, "timeout_seconds"_a)
        .def("wake", &ControlPage::wake, "index"_a)
        .def("close", &ControlPage::close);

    nb::class_<Memory>(m, "Mapping", nb::type_slots(memory_slots))
        .def(nb::init<int, std::size_t>(), "fd"_a, "nbytes"_a)
        .def_prop_ro("address", &Memory::address)
        .def_prop_ro("nbytes", &Memory::nbytes)
        .def("view", &memory_view)
        .def("populate", &Memory::populate, "offset"_a, "nbytes"_a)
        .def("close", &Memory::close);

    m.def("memory_file", &ftrain::memory_file, "name"_a, "huge_pages"_a = false);
    m.def("crc32c", &crc32c, "buffer"_a, "value"_a = 0);
    m.def("crc32c_address", &crc32c_address, "address"_a, "nbytes"_a, "value"_a = 0);
    m.def("crc32c_backend", &ftrain::crc32c_backend);
    m.def("copy_batch", &copy_batch, "pairs"_a, "threads"_a = 1);
    ftrain::bind_columns(m);
    ftrain::bind_cuda(m);
    ftrain::bind_engine(m);
    ftrain::bind_fence(m);
    ftrain::bind_look(m);
    m.def("set_parent_death_signal", &ftrain::set_parent_death_signal, "signum"_a);
    m.def("set_child_subreaper", &ftrain::set_child_subreaper, "on"_a);
    m.def("list_gloo_waits", &ftrain::list_gloo_waits);
    m.def("end_gloo_waits", &ftrain::end_gloo_waits, "message"_a, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<ftrain::Taken>(m, "Taken").def(nb::init<>()).def("seconds", &ftrain::Taken::seconds);
    m.def("wake_politely", &ftrain::wake_politely);
    m.def("leave_sigterm_to_parent", &ftrain::leave_sigterm_to_parent);
}

// What Python sees of cuda/. The GIL is off while the driver is asked, and on when Python's objects are let go.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "cuda/digest.hpp"
#include "cuda/nvrtc.hpp"
#include "cuda/plan.hpp"
#include "cuda/stager.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace ftrain::cuda {

namespace {

using PyCopies = std::vector<std::tuple<std::uintptr_t, DeviceAddress, std::size_t>>;
using PyRanges = std::vector<std::tuple<DeviceAddress, std::size_t>>;

StreamHandle stream_of(std::uintptr_t handle) {
    return reinterpret_cast<StreamHandle>(handle);
}

// A ticket, and what Python wants kept alive until its copies are done.
class PyTicket {
public:
    PyTicket(std::unique_ptr<Ticket> ticket, nb::object keep) : ticket_(std::move(ticket)), keep_(std::move(keep)) {}
    ~PyTicket() {
        const nb::gil_scoped_release no_gil;
        ticket_.reset();
    }
    PyTicket(const PyTicket&) = delete;
    PyTicket& operator=(const PyTicket&) = delete;

    void order(std::uintptr_t compute_stream) const {
        const nb::gil_scoped_release no_gil;
        ticket_->order(stream_of(compute_stream));
    }

    bool done() {
        const bool done = [this] {
            const nb::gil_scoped_release no_gil;
            return ticket_->done();
        }();
        if (done) {
            keep_.reset();
        }
        return done;
    }

    void wait() {
        {
            const nb::gil_scoped_release no_gil;
            ticket_->wait();
        }
        keep_.reset();
    }

private:
    std::unique_ptr<Ticket> ticket_;
    nb::object keep_;
};

class PyPlan {
public:
    PyPlan(std::shared_ptr<Stager> stager, const PyCopies& copies, Direction direction) {
        std::vector<HostDeviceCopy> plain;
        plain.reserve(copies.size());
        for (const auto& [host, device, nbytes] : copies) {
            plain.push_back({host, device, nbytes});
        }
        plan_ = std::make_shared<Plan>(std::move(stager), plain, direction);
    }
    ~PyPlan() {
        const nb::gil_scoped_release no_gil;
        plan_.reset();
    }
    PyPlan(PyPlan&&) = delete;

    std::unique_ptr<PyTicket> begin(std::uintptr_t compute_stream, nb::object keep) {
        std::unique_ptr<Ticket> ticket;
        {
            const nb::gil_scoped_release no_gil;
            ticket = plan_->begin(stream_of(compute_stream));
        }
        return std::make_unique<PyTicket>(std::move(ticket), std::move(keep));
    }

    std::size_t nbytes() const { return plan_->nbytes(); }

private:
    std::shared_ptr<Plan> plan_;
};

class PyPin {
public:
    PyPin(std::shared_ptr<Stager> stager, std::uintptr_t address, std::size_t nbytes)
        : stager_(std::move(stager)), pin_(stager_->pin(address, nbytes)) {}
    ~PyPin() {
        const nb::gil_scoped_release no_gil;
        stager_->unpin(*pin_);
        pin_.reset();
        stager_.reset();
    }
    PyPin(PyPin&&) = delete;

    bool pinned() const { return pin_->pinned(); }
    std::string reason() const { return pin_->reason(); }
    void close() {
        const nb::gil_scoped_release no_gil;
        stager_->unpin(*pin_);
    }

private:
    std::shared_ptr<Stager> stager_;
    std::shared_ptr<Pin> pin_;
};

class PyStager {
public:
    PyStager(int device, std::vector<std::string> nvrtc) {
        const nb::gil_scoped_release no_gil;
        stager_ = std::make_shared<Stager>(device, std::move(nvrtc));
    }
    ~PyStager() {
        const nb::gil_scoped_release no_gil;
        stager_.reset();
    }
    PyStager(PyStager&&) = delete;

    int device() const { return stager_->context().ordinal(); }

    std::unique_ptr<PyPin> pin(std::uintptr_t address, std::size_t nbytes) {
        const nb::gil_scoped_release no_gil;
        return std::make_unique<PyPin>(stager_, address, nbytes);
    }

    std::unique_ptr<PyPlan> plan(const PyCopies& copies, bool upload) {
        const nb::gil_scoped_release no_gil;
        return std::make_unique<PyPlan>(stager_, copies, upload ? Direction::TO_DEVICE : Direction::TO_HOST);
    }

    std::unique_ptr<PyTicket> begin(const PyCopies& copies, std::uintptr_t compute_stream, nb::object keep) {
        return plan(copies, false)->begin(compute_stream, std::move(keep));
    }

    std::unique_ptr<PyTicket> upload(const PyCopies& copies, std::uintptr_t compute_stream, nb::object keep) {
        return plan(copies, true)->begin(compute_stream, std::move(keep));
    }

    std::tuple<std::string, std::string> small_copies() {
        const nb::gil_scoped_release no_gil;
        const Current current(stager_->context());
        const std::lock_guard lock(stager_->mutex());
        const SmallCopies how = stager_->small_copies();
        return {how == SmallCopies::KERNEL  ? "kernel"
                : how == SmallCopies::BATCH ? "batch"
                                            : "single",
                stager_->no_kernels()};
    }

    std::vector<std::uint64_t> digest(const PyRanges& ranges, std::uintptr_t compute_stream) {
        const nb::gil_scoped_release no_gil;
        std::vector<DeviceRange> plain;
        plain.reserve(ranges.size());
        for (const auto& [address, nbytes] : ranges) {
            plain.push_back({address, nbytes});
        }
        return digest_of_device(*stager_, plain, stream_of(compute_stream));
    }

private:
    std::shared_ptr<Stager> stager_;
};

std::uint64_t digest_address(std::uintptr_t address, std::size_t nbytes) {
    if (address == 0 && nbytes != 0) {
        throw std::invalid_argument("a digest was given a null address");
    }
    const nb::gil_scoped_release no_gil;
    return digest_of_host(reinterpret_cast<const void*>(address), nbytes);
}

nb::bytes compile(std::tuple<int, int> capability, const std::vector<std::string>& nvrtc) {
    std::vector<char> code;
    {
        const nb::gil_scoped_release no_gil;
        code = compile_kernels(std::get<0>(capability), std::get<1>(capability), nvrtc);
    }
    return nb::bytes(code.data(), code.size());
}

}  // namespace

}  // namespace ftrain::cuda

namespace ftrain {

void bind_cuda(nb::module_& m) {
    using namespace ftrain::cuda;
    nb::exception<Failure>(m, "CudaFailure", PyExc_RuntimeError);

    nb::class_<Probe>(m, "CudaProbe")
        .def_ro("usable", &Probe::usable)
        .def_ro("reason", &Probe::reason)
        .def_ro("driver_version", &Probe::driver_version)
        .def_ro("devices", &Probe::devices);

    nb::class_<PyPin>(m, "CudaPin")
        .def_prop_ro("pinned", &PyPin::pinned)
        .def_prop_ro("reason", &PyPin::reason)
        .def("close", &PyPin::close);

    nb::class_<PyTicket>(m, "CudaTicket")
        .def("order", &PyTicket::order, "compute_stream"_a)
        .def("done", &PyTicket::done)
        .def("wait", &PyTicket::wait);

    nb::class_<PyPlan>(m, "CudaPlan")
        .def_prop_ro("nbytes", &PyPlan::nbytes)
        .def("begin", &PyPlan::begin, "compute_stream"_a, "keep"_a = nb::none());

    nb::class_<PyStager>(m, "CudaStager")
        .def(nb::init<int, std::vector<std::string>>(), "device"_a = 0, "nvrtc"_a = std::vector<std::string>{})
        .def_prop_ro("device", &PyStager::device)
        .def("pin", &PyStager::pin, "address"_a, "nbytes"_a)
        .def("plan", &PyStager::plan, "copies"_a, "upload"_a = false)
        .def("begin", &PyStager::begin, "copies"_a, "compute_stream"_a, "keep"_a = nb::none())
        .def("upload", &PyStager::upload, "copies"_a, "compute_stream"_a, "keep"_a = nb::none())
        .def("small_copies", &PyStager::small_copies)
        .def("digest", &PyStager::digest, "ranges"_a, "compute_stream"_a);

    m.def("cuda_probe", &probe, nb::call_guard<nb::gil_scoped_release>());
    m.def("cuda_compile", &compile, "capability"_a, "nvrtc"_a);
    m.def("digest_address", &digest_address, "address"_a, "nbytes"_a);
}

}  // namespace ftrain

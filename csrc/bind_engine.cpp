// The checkpoint engine for Python: copies, packs, fetches.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "copy.hpp"
#include "fetch.hpp"
#include "pack.hpp"
#include "transfer.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace ftrain {

namespace {

TransferBackend backend_of(const std::string& name) {
    if (name == "any") {
        return TransferBackend::any;
    }
    if (name == "io_uring") {
        return TransferBackend::uring;
    }
    if (name == "threads") {
        return TransferBackend::threads;
    }
    throw std::invalid_argument("backend must be any, io_uring or threads, not " + name);
}

std::string backend_name(const std::string& backend) {
    return TransferQueue::make(1, backend_of(backend))->name();
}

// Signals are looked after, and the caller's own wish to stop.
OnIdle idle_call(const nb::object& on_idle) {
    return [&on_idle] {
        nb::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) {
            throw nb::python_error();
        }
        if (!on_idle.is_none()) {
            on_idle();
        }
    };
}

template <class Row, class Make>
std::vector<Row> rows_of(std::initializer_list<nb::handle> columns, Make make) {
    std::vector<std::unique_ptr<Buffer>> buffers;
    for (const nb::handle column : columns) {
        buffers.push_back(std::make_unique<Buffer>(column));
        if (buffers.back()->item_bytes() != sizeof(std::uint64_t)) {
            throw std::invalid_argument("a column must hold 64-bit words, as array(\"Q\") does");
        }
        if (buffers.back()->words().size() != buffers.front()->words().size()) {
            throw std::invalid_argument("the columns differ in length");
        }
    }
    std::vector<Row> rows;
    rows.reserve(buffers.front()->words().size());
    for (std::size_t i = 0; i < buffers.front()->words().size(); ++i) {
        rows.push_back(make([&](std::size_t column) { return buffers[column]->words()[i]; }));
    }
    return rows;
}

std::uint32_t narrow(std::uint64_t word) {
    if (word > std::numeric_limits<std::uint32_t>::max()) {
        throw std::invalid_argument("file numbers and checksums have 32 bits, not " + std::to_string(word));
    }
    return static_cast<std::uint32_t>(word);
}

// What Python calls CopyPlan. A plan that belonged to Python itself would be let go of by a copying thread, which would need
// the GIL for it: from whoever waits for that thread.
struct HeldPlan {
    HeldPlan(nb::handle offsets, nb::handle sources, nb::handle sizes)
        : plan(std::make_shared<CopyPlan>(rows_of<Copy>({offsets, sources, sizes}, [](const auto& word) {
              return Copy{word(0), word(1), static_cast<std::size_t>(word(2))};
          }))) {}

    std::shared_ptr<const CopyPlan> plan;
};

Pack make_pack(nb::handle offsets, nb::handle addresses, nb::handle sizes, std::uint64_t payload_bytes, std::uint64_t chunk_bytes,
               std::uint64_t image_bytes, const nb::bytes& ending, std::uintptr_t image) {
    return {rows_of<Box>({offsets, addresses, sizes}, [](const auto& word) { return Box{word(0), word(1), word(2)}; }),
            Geometry{payload_bytes, chunk_bytes, image_bytes}, std::string(ending.c_str(), ending.size()), image};
}

std::tuple<std::vector<std::uint32_t>, std::vector<std::uint32_t>> write_pack(const Pack& pack, int fd, unsigned threads,
                                                                              unsigned depth, int nice,
                                                                              std::uint64_t bytes_per_second_max,
                                                                              double processors_max, const std::string& backend,
                                                                              const nb::object& on_idle) {
    const WriteOptions options{depth, bytes_per_second_max, processors_max, CrewOptions{threads, nice}, backend_of(backend)};
    nb::gil_scoped_release no_gil;
    Sums sums = pack.write(fd, options, idle_call(on_idle));
    return {std::move(sums.boxes), std::move(sums.chunks)};
}

std::vector<std::size_t> fetch_ranges(const std::vector<std::tuple<int, bool>>& files, nb::handle file_numbers, nb::handle sums,
                                      nb::handle offsets, nb::handle sizes, nb::handle addresses, unsigned threads, unsigned depth,
                                      std::size_t block_bytes, const std::string& backend, const nb::object& on_idle) {
    const auto wanted = rows_of<Wanted>({file_numbers, sums, offsets, sizes, addresses}, [](const auto& word) {
        return Wanted{narrow(word(0)), narrow(word(1)), word(2), word(3), word(4)};
    });
    std::vector<File> opened;
    for (const auto& [fd, direct] : files) {
        opened.push_back({fd, direct});
    }
    const FetchOptions options{depth, block_bytes, CrewOptions{threads, 0}, backend_of(backend)};
    nb::gil_scoped_release no_gil;
    return fetch(opened, wanted, options, idle_call(on_idle));
}

// As a fetch, from memory that holds a pack's image.
std::vector<std::size_t> gather(std::uintptr_t image, std::uint64_t nbytes, nb::handle sums, nb::handle offsets, nb::handle sizes,
                                nb::handle addresses, unsigned threads) {
    const auto wanted = rows_of<Wanted>({sums, offsets, sizes, addresses}, [&](const auto& word) {
        if (word(1) > nbytes || word(2) > nbytes - word(1)) {
            throw std::invalid_argument("a range reaches beyond the image");
        }
        return Wanted{0, narrow(word(0)), word(1), word(2), word(3)};
    });
    if (image == 0) {
        throw std::invalid_argument("the image has a null address");
    }
    const File file{-1, false, image};
    FetchOptions options;
    options.crew.threads = threads;
    const nb::object none = nb::none();
    nb::gil_scoped_release no_gil;
    return fetch(std::span(&file, 1), wanted, options, idle_call(none));
}

}  // namespace

void bind_engine(nb::module_& m) {
    nb::class_<HeldPlan>(m, "CopyPlan")
        .def(nb::init<nb::handle, nb::handle, nb::handle>(), "offsets"_a, "sources"_a, "sizes"_a)
        .def_prop_ro("nbytes", [](const HeldPlan& self) { return self.plan->nbytes(); });

    nb::class_<CopyJob>(m, "CopyJob")
        .def("done", &CopyJob::done)
        .def("wait", &CopyJob::wait, nb::call_guard<nb::gil_scoped_release>())
        .def("taken_seconds", &CopyJob::taken_seconds, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<Copier>(m, "Copier")
        .def(nb::init<unsigned>(), "threads"_a)
        .def("begin", [](Copier& self, const HeldPlan& plan, std::uintptr_t base) { return self.begin(plan.plan, base); },
             "plan"_a, "base"_a);

    nb::class_<Pack>(m, "Pack")
        .def("__init__",
             [](Pack* self, nb::handle offsets, nb::handle addresses, nb::handle sizes, std::uint64_t payload_bytes,
                std::uint64_t chunk_bytes, std::uint64_t image_bytes, const nb::bytes& ending, std::uintptr_t image) {
                 new (self) Pack(make_pack(offsets, addresses, sizes, payload_bytes, chunk_bytes, image_bytes, ending, image));
             },
             "offsets"_a, "addresses"_a, "sizes"_a, "payload_bytes"_a, "chunk_bytes"_a, "image_bytes"_a, "ending"_a,
             "image"_a = 0)
        .def_prop_ro("nbytes", [](const Pack& self) { return self.geometry().image_bytes; })
        .def("write", &write_pack, "fd"_a, nb::kw_only(), "threads"_a = 1, "depth"_a = 8, "nice"_a = 0,
             "bytes_per_second_max"_a = 0, "processors_max"_a = 0.0, "backend"_a = "any", "on_idle"_a.none() = nb::none());

    m.def("fetch", &fetch_ranges, "files"_a, "file_numbers"_a, "sums"_a, "offsets"_a, "sizes"_a, "addresses"_a, nb::kw_only(),
          "threads"_a = 2, "depth"_a = 8, "block_bytes"_a = std::size_t{2} << 20, "backend"_a = "any",
          "on_idle"_a.none() = nb::none());
    m.def("gather", &gather, "image"_a, "nbytes"_a, "sums"_a, "offsets"_a, "sizes"_a, "addresses"_a, nb::kw_only(),
          "threads"_a = 2);
    m.def("cached_share", &cached_share, "fd"_a);
    m.def("transfer_backend", &backend_name, "backend"_a = "any");
}

}  // namespace ftrain

// A look at many tensors at once: whether they are where they were, as they were, and whether they were written to.
//
// Tens of thousands of tensors are more than the caches hold, and nearly all of the time would go into waiting for memory: so
// what comes next is fetched ahead, a tensor's own memory by where its shape was the last time. That may be wrong by now; a
// prefetch of any address does no harm.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "anatomy.hpp"
#include "bindings.hpp"
#include "dlpack.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace ftrain {

namespace {

constexpr std::size_t AHEAD = 16;  // tensors
constexpr std::ptrdiff_t LINE_BYTES = 64;
constexpr auto REST = std::chrono::microseconds(20);  // long enough for another thread to take the interpreter

// Element after element, in C order.
bool is_contiguous(const dlpack::Tensor& tensor) {
    const std::int64_t* shape = tensor.shape;
    if (tensor.strides == nullptr || std::find(shape, shape + tensor.dimensions, 0) != shape + tensor.dimensions) {
        return true;
    }
    std::int64_t expected = 1;
    for (std::int32_t i = tensor.dimensions - 1; i >= 0; --i) {
        if (shape[i] != 1 && tensor.strides[i] != expected) {
            return false;
        }
        expected *= shape[i];
    }
    return true;
}

// A dict as it was at one time: CPython gives it another number at each change, and none to two dicts. An empty one where this
// CPython has no such numbers.
class DictMark {
public:
    explicit DictMark(const nb::handle dict) : dict_(dict.ptr()) {
#if PY_VERSION_HEX < 0x030C0000
        number_ = reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag;
#endif
    }

    bool tells() const { return number_ != 0; }
    bool operator==(const DictMark&) const = default;

private:
    const PyObject* dict_;  // not held: another dict at its place has another number
    std::uint64_t number_ = 0;
};

class Look {
public:
    Look(std::size_t tensors, const Anatomy* anatomy) {
        if (anatomy != nullptr) {
            anatomy_ = *anatomy;
            roots_.reserve(tensors);
        }
        objects_.reserve(tensors);
        places_.reserve(tensors);
        shapes_.reserve(tensors);
        extents_.reserve(4 * tensors);  // most have two dimensions
    }

    void add(PyObject* object, const dlpack::Tensor& tensor) {
        objects_.push_back(object);
        places_.push_back({reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset, tensor.device, tensor.dtype,
                           tensor.dimensions});
        shapes_.push_back(reinterpret_cast<const char*>(tensor.shape));
        all_in_host_memory_ = all_in_host_memory_ && tensor.device.type == dlpack::CPU && is_contiguous(tensor);
        extents_.insert(extents_.end(), tensor.shape, tensor.shape + tensor.dimensions);
        if (tensor.strides != nullptr) {
            extents_.insert(extents_.end(), tensor.strides, tensor.strides + tensor.dimensions);
        }
        if (anatomy_.has_value()) {
            const std::uintptr_t implementation = anatomy_->implementation_of(object);
            roots_.push_back({implementation, anatomy_->counter_of(implementation), anatomy_->identity_of(implementation)});
        }
    }

    bool operator==(const Look& other) const { return places_ == other.places_ && extents_ == other.extents_; }
    bool is_of(const Look& other) const { return objects_ == other.objects_; }

    bool all_in_host_memory() const { return all_in_host_memory_; }

    std::vector<std::uint64_t> addresses() const {
        std::vector<std::uint64_t> found;
        found.reserve(places_.size());
        for (const Place& place : places_) {
            found.push_back(place.address);
        }
        return found;
    }

    const std::optional<Anatomy>& anatomy() const { return anatomy_; }
    PyObject* object(std::size_t tensor) const { return objects_[tensor]; }

    // Whether these dicts are as they were when they were marked: holding the objects of the look, in their order, by these keys.
    bool is_in(const std::vector<DictMark>& dicts, const nb::list& keys) const {
        return !dicts.empty() && dicts == marked_ && keys.is(marked_keys_);
    }
    void mark(std::vector<DictMark> dicts, const nb::list& keys) {
        marked_ = std::move(dicts);
        marked_keys_ = keys;
    }
    std::size_t size() const { return objects_.size(); }

    // The version of a tensor that is the same object with the same memory and counter as then; -1 where it is not.
    std::int64_t version_if_same(std::size_t tensor, const PyObject* object) const {
        if (object != objects_[tensor]) {
            return -1;
        }
        const std::uintptr_t implementation = anatomy_->implementation_of(object);
        if (implementation != roots_[tensor].implementation || anatomy_->identity_of(implementation) != roots_[tensor].identity) {
            return -1;
        }
        const std::uintptr_t counter = anatomy_->counter_of(implementation);
        return counter == 0 ? -1 : std::int64_t{anatomy_->version_of(counter)};
    }

    // What reading its version will need. Both are inlined always: a call without any effect but a prefetch is left out.
    [[gnu::always_inline]] void prefetch_version(std::size_t tensor) const {
        if (tensor < roots_.size()) {
            __builtin_prefetch(objects_[tensor], 1);  // its references are about to be counted
            __builtin_prefetch(reinterpret_cast<const void*>(roots_[tensor].implementation + Anatomy::FIRST_MEMBER));
            __builtin_prefetch(reinterpret_cast<const void*>(roots_[tensor].implementation + anatomy_->counter));
            __builtin_prefetch(reinterpret_cast<const void*>(roots_[tensor].counter + anatomy_->version));
        }
    }

    [[gnu::always_inline]] void prefetch(std::size_t tensor) const {
        if (tensor < shapes_.size()) {
            for (std::ptrdiff_t line = -2; line <= 1; ++line) {
                __builtin_prefetch(shapes_[tensor] + line * LINE_BYTES);
            }
        }
    }

private:
    struct Place {
        std::uintptr_t address;
        dlpack::Device device;
        dlpack::DataType dtype;
        std::int32_t dimensions;
        bool operator==(const Place&) const = default;
    };

    struct Root {
        std::uintptr_t implementation;
        std::uintptr_t counter;
        std::uint64_t identity;
    };

    std::vector<PyObject*> objects_;        // not held: only to be compared, or where dicts that were marked hold them
    std::vector<DictMark> marked_;
    nb::object marked_keys_;                // held: another list may come to its place
    std::vector<Root> roots_;               // where the anatomy is known: not held, either
    std::optional<Anatomy> anatomy_;
    std::vector<const char*> shapes_;       // where a tensor has them: only to be fetched ahead
    std::vector<Place> places_;
    std::vector<std::int64_t> extents_;  // shape and strides, of all tensors in a row
    bool all_in_host_memory_ = true;
};

// Calls `visit` with each object of the list until it answers false. The list must not change: after so many `at_a_time` (0:
// never) other threads have the interpreter for a moment.
template <class Prefetch, class Visit>
bool visit_all(const nb::list& tensors, std::size_t at_a_time, Prefetch prefetch, Visit visit) {
    const std::size_t count = tensors.size();
    for (std::size_t i = 0; i < count; ++i) {
        if (at_a_time != 0 && i % at_a_time == at_a_time - 1) {
            nb::gil_scoped_release no_gil;
            std::this_thread::sleep_for(REST);
        }
        if (i + AHEAD < count) {
            prefetch(i + AHEAD);
        }
        if (!visit(i, PyList_GET_ITEM(tensors.ptr(), i))) {
            return false;
        }
    }
    return true;
}

bool is_one_of(const nb::tuple& kinds, const PyObject* object) {
    const auto* kind = reinterpret_cast<const PyObject*>(Py_TYPE(object));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds.ptr()); ++i) {
        if (PyTuple_GET_ITEM(kinds.ptr(), i) == kind) {
            return true;
        }
    }
    return false;
}

nb::object look(const nb::list& tensors, const nb::tuple& kinds, nb::handle capsule, const Look* before, const Anatomy* anatomy,
                std::size_t at_a_time) {
    const auto* exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::CAPSULE));
    if (exchange == nullptr) {
        throw nb::python_error();
    }
    if (exchange->major != dlpack::MAJOR || exchange->from_python == nullptr) {
        return nb::none();
    }
    Look found(tensors.size(), anatomy);
    const auto prefetch = [&](std::size_t next) {
        __builtin_prefetch(PyList_GET_ITEM(tensors.ptr(), next));
        if (before != nullptr) {
            before->prefetch(next);
        } else if (anatomy != nullptr) {
            // The object itself was fetched a while ago.
            const std::size_t further = std::min(next + AHEAD, tensors.size() - 1);
            __builtin_prefetch(PyList_GET_ITEM(tensors.ptr(), further));
            const PyObject* object = PyList_GET_ITEM(tensors.ptr(), next);
            if (is_one_of(kinds, object)) {
                const auto* implementation = reinterpret_cast<const char*>(anatomy->implementation_of(object));
                for (std::ptrdiff_t line = 0; line <= 2; ++line) {
                    __builtin_prefetch(implementation + line * LINE_BYTES);
                }
            }
        }
    };
    const bool all = visit_all(tensors, at_a_time, prefetch, [&](std::size_t, PyObject* tensor) {
        dlpack::Tensor described{};
        if (!is_one_of(kinds, tensor)) {
            return false;
        }
        if (exchange->from_python(tensor, &described) != 0) {
            PyErr_Clear();
            return false;
        }
        found.add(tensor, described);
        return described.dtype.code != dlpack::COMPLEX;  // whether it is to be read conjugated is not told
    });
    return all ? nb::cast(std::move(found)) : nb::none();
}

template <class Word>
nb::bytes bytes_of(const std::vector<Word>& words) {
    return nb::bytes(words.data(), words.size() * sizeof(Word));
}

nb::bytes counters(const nb::list& objects, nb::handle descriptor, const Look* before, const Anatomy* anatomy,
                   std::size_t at_a_time) {
    if (Py_TYPE(descriptor.ptr()) != &PyGetSetDescr_Type) {
        throw nb::type_error("counters: not the descriptor of an attribute that is computed");
    }
    const auto* attribute = reinterpret_cast<const PyGetSetDescrObject*>(descriptor.ptr());
    std::vector<std::int64_t> found;
    found.reserve(objects.size());
    const auto prefetch = [&](std::size_t next) {
        if (before != nullptr && anatomy != nullptr) {
            before->prefetch_version(next);
        } else if (before != nullptr) {
            before->prefetch(next);
        }
    };
    visit_all(objects, at_a_time, prefetch, [&](std::size_t, PyObject* object) {
        if (PyObject_TypeCheck(object, attribute->d_common.d_type) == 0) {
            throw nb::type_error("counters: an object has another type than the attribute is for");
        }
        const std::uintptr_t implementation = anatomy == nullptr ? 0 : anatomy->implementation_of(object);
        const std::uintptr_t counter = implementation == 0 ? 0 : anatomy->counter_of(implementation);
        if (counter != 0) {
            found.push_back(anatomy->version_of(counter));
            return true;
        }
        const nb::object value = nb::steal(nb::detail::raise_if_null(attribute->d_getset->get(object, attribute->d_getset->closure)));
        found.push_back(nb::cast<std::int64_t>(value));
        return true;
    });
    return bytes_of(found);
}

// Whether the dicts, gone through in their order, have these keys and the tensors of the look.
bool holds(const Look& before, const nb::list& dicts, const nb::list& keys) {
    std::size_t number = 0;
    for (const nb::handle dict : dicts) {
        Py_ssize_t place = 0;
        PyObject* key = nullptr;
        PyObject* tensor = nullptr;
        while (PyDict_Next(dict.ptr(), &place, &key, &tensor) != 0) {
            if (number == before.size() || key != PyList_GET_ITEM(keys.ptr(), number) || tensor != before.object(number)) {
                return false;
            }
            ++number;
        }
    }
    return number == before.size();
}

// (the tensors in the dicts, their versions) where keys and tensors are those of the look.
nb::object recall(Look& before, const nb::list& dicts, const nb::list& keys, const nb::tuple& kinds) {
    const std::size_t count = before.size();
    if (!before.anatomy().has_value() || keys.size() != count) {
        return nb::none();
    }
    std::vector<DictMark> marks;
    for (const nb::handle dict : dicts) {
        if (PyDict_Check(dict.ptr()) == 0) {
            return nb::none();
        }
        marks.emplace_back(dict);
    }
    if (!before.is_in(marks, keys)) {
        if (!holds(before, dicts, keys)) {
            return nb::none();
        }
        const bool tell = std::all_of(marks.begin(), marks.end(), [](const DictMark& mark) { return mark.tells(); });
        before.mark(tell ? std::move(marks) : std::vector<DictMark>(), keys);
    }
    const nb::object found = nb::steal(nb::detail::raise_if_null(PyList_New(static_cast<Py_ssize_t>(count))));
    const nb::object words = nb::steal(
        nb::detail::raise_if_null(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(count * sizeof(std::int64_t)))));
    auto* versions = reinterpret_cast<std::int64_t*>(PyBytes_AS_STRING(words.ptr()));
    for (std::size_t number = 0; number < count; ++number) {
        before.prefetch_version(number + AHEAD);
        PyObject* tensor = before.object(number);
        if (!is_one_of(kinds, tensor)) {
            return nb::none();
        }
        versions[number] = before.version_if_same(number, tensor);
        if (versions[number] < 0) {
            return nb::none();
        }
        Py_INCREF(tensor);
        PyList_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(number), tensor);
    }
    return nb::make_tuple(found, words);
}

// The versions of these tensors where they are those of the look.
nb::object versions_if_same(const Look& before, const nb::list& tensors) {
    if (!before.anatomy().has_value() || tensors.size() != before.size()) {
        return nb::none();
    }
    std::vector<std::int64_t> found;
    found.reserve(before.size());
    const bool all = visit_all(tensors, 0, [&](std::size_t next) { before.prefetch_version(next); },
                               [&](std::size_t number, const PyObject* tensor) {
                                   found.push_back(before.version_if_same(number, tensor));
                                   return found.back() >= 0;
                               });
    return all ? nb::object(bytes_of(found)) : nb::none();
}

std::optional<Anatomy> find_anatomy(const nb::list& tensors, const std::vector<std::uintptr_t>& implementations,
                                    const std::vector<std::uint32_t>& versions) {
    if (tensors.size() != implementations.size() || tensors.size() != versions.size()) {
        throw std::invalid_argument("find_anatomy: the lists differ in length");
    }
    std::vector<Specimen> specimens;
    for (std::size_t i = 0; i < versions.size(); ++i) {
        const PyObject* object = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
        specimens.push_back({reinterpret_cast<std::uintptr_t>(object), static_cast<std::size_t>(Py_TYPE(object)->tp_basicsize),
                             implementations[i], versions[i]});
    }
    return dissect(specimens);
}

}  // namespace

void bind_look(nb::module_& m) {
    nb::class_<Look>(m, "Look")
        .def("__eq__", [](const Look& self, const Look& other) { return self == other; }, nb::is_operator())
        .def("is_of", &Look::is_of, "other"_a)
        .def_prop_ro("all_in_host_memory", &Look::all_in_host_memory)
        .def("addresses", [](const Look& self) { return bytes_of(self.addresses()); })
        .def("recall", &recall, "dicts"_a, "keys"_a, "kinds"_a)
        .def("versions", &versions_if_same, "tensors"_a);
    nb::class_<Anatomy>(m, "Anatomy");
    m.def("find_anatomy", &find_anatomy, "tensors"_a, "implementations"_a, "versions"_a);
    m.def("look", &look, "tensors"_a, "kinds"_a, "exchange"_a, "before"_a.none() = nb::none(), "anatomy"_a.none() = nb::none(),
          "at_a_time"_a = 0);
    m.def("counters", &counters, "objects"_a, "descriptor"_a, "before"_a.none() = nb::none(), "anatomy"_a.none() = nb::none(),
          "at_a_time"_a = 0);
}

}  // namespace ftrain

// A look at many tensors at once: whether they are where they were, as they were, and whether they were written to.
//
// Tens of thousands of tensors are more than the caches hold, and nearly all of the time would go into waiting for memory: so
// what comes next is fetched ahead, a tensor's own memory by where its shape was the last time. That may be wrong by now; a
// prefetch of any address does no harm.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "dlpack.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace ftrain {

namespace {

constexpr std::size_t AHEAD = 12;  // tensors
constexpr std::ptrdiff_t LINE_BYTES = 64;

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

class Look {
public:
    explicit Look(std::size_t tensors) {
        objects_.reserve(tensors);
        places_.reserve(tensors);
        shapes_.reserve(tensors);
        extents_.reserve(4 * tensors);  // most have two dimensions
    }

    void add(const PyObject* object, const dlpack::Tensor& tensor) {
        objects_.push_back(object);
        places_.push_back({reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset, tensor.device, tensor.dtype,
                           tensor.dimensions});
        shapes_.push_back(reinterpret_cast<const char*>(tensor.shape));
        all_in_host_memory_ = all_in_host_memory_ && tensor.device.type == dlpack::CPU && is_contiguous(tensor);
        extents_.insert(extents_.end(), tensor.shape, tensor.shape + tensor.dimensions);
        if (tensor.strides != nullptr) {
            extents_.insert(extents_.end(), tensor.strides, tensor.strides + tensor.dimensions);
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

    void prefetch(std::size_t tensor) const {
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

    std::vector<const PyObject*> objects_;  // not held: only to be compared
    std::vector<const char*> shapes_;       // where a tensor has them: only to be fetched ahead
    std::vector<Place> places_;
    std::vector<std::int64_t> extents_;  // shape and strides, of all tensors in a row
    bool all_in_host_memory_ = true;
};

// Calls `visit` with each object of the list until it answers false. It must not change the list.
template <class Visit>
bool visit_all(const nb::list& tensors, const Look* before, Visit visit) {
    const std::size_t count = tensors.size();
    for (std::size_t i = 0; i < count; ++i) {
        if (i + AHEAD < count) {
            __builtin_prefetch(PyList_GET_ITEM(tensors.ptr(), i + AHEAD));
            if (before != nullptr) {
                before->prefetch(i + AHEAD);
            }
        }
        if (!visit(PyList_GET_ITEM(tensors.ptr(), i))) {
            return false;
        }
    }
    return true;
}

nb::object look(const nb::list& tensors, const nb::tuple& kinds, nb::handle capsule, const Look* before) {
    const auto* exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::CAPSULE));
    if (exchange == nullptr) {
        throw nb::python_error();
    }
    if (exchange->major != dlpack::MAJOR || exchange->from_python == nullptr) {
        return nb::none();
    }
    Look found(tensors.size());
    const bool all = visit_all(tensors, before, [&](PyObject* tensor) {
        const auto* kind = reinterpret_cast<const PyObject*>(Py_TYPE(tensor));
        if (std::none_of(kinds.begin(), kinds.end(), [&](nb::handle one) { return one.ptr() == kind; })) {
            return false;
        }
        dlpack::Tensor described{};
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

nb::bytes counters(const nb::list& objects, nb::handle descriptor, const Look* before) {
    if (Py_TYPE(descriptor.ptr()) != &PyGetSetDescr_Type) {
        throw nb::type_error("counters: not the descriptor of an attribute that is computed");
    }
    const auto* attribute = reinterpret_cast<const PyGetSetDescrObject*>(descriptor.ptr());
    std::vector<std::int64_t> found;
    found.reserve(objects.size());
    visit_all(objects, before, [&](PyObject* object) {
        if (PyObject_TypeCheck(object, attribute->d_common.d_type) == 0) {
            throw nb::type_error("counters: an object has another type than the attribute is for");
        }
        const nb::object value = nb::steal(nb::detail::raise_if_null(attribute->d_getset->get(object, attribute->d_getset->closure)));
        found.push_back(nb::cast<std::int64_t>(value));
        return true;
    });
    return bytes_of(found);
}

}  // namespace

void bind_look(nb::module_& m) {
    nb::class_<Look>(m, "Look")
        .def("__eq__", [](const Look& self, const Look& other) { return self == other; }, nb::is_operator())
        .def("is_of", &Look::is_of, "other"_a)
        .def_prop_ro("all_in_host_memory", &Look::all_in_host_memory)
        .def("addresses", [](const Look& self) { return bytes_of(self.addresses()); });
    m.def("look", &look, "tensors"_a, "kinds"_a, "exchange"_a, "before"_a.none() = nb::none());
    m.def("counters", &counters, "objects"_a, "descriptor"_a, "before"_a.none() = nb::none());
}

}  // namespace ftrain

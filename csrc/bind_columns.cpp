// One attribute of tens of thousands of records at a time, read where it lies: asking each in Python takes ten times as long.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "bindings.hpp"

// After Python's own header, which the one above includes.
#include <structmember.h>

namespace nb = nanobind;
using namespace nb::literals;

namespace ftrain {

namespace {

constexpr Py_ssize_t AHEAD = 16;  // records

// A list or a tuple.
class Records {
public:
    explicit Records(nb::handle records) : size_(PySequence_Fast_GET_SIZE(checked(records))), items_(PySequence_Fast_ITEMS(records.ptr())) {}

    Py_ssize_t size() const { return size_; }
    const char* at(Py_ssize_t place) const {
        if (place + AHEAD < size_) {
            __builtin_prefetch(items_[place + AHEAD]);
        }
        return reinterpret_cast<const char*>(items_[place]);
    }

private:
    static PyObject* checked(nb::handle records) {
        if (PyList_CheckExact(records.ptr()) == 0 && PyTuple_CheckExact(records.ptr()) == 0) {
            throw nb::type_error("records are given in a list or a tuple");
        }
        return records.ptr();
    }

    Py_ssize_t size_;
    PyObject** items_;
};

// An attribute that lies in its record as a reference, as those of classes with slots do.
class Member {
public:
    explicit Member(nb::handle descriptor) : kind_(checked(descriptor)->d_common.d_type), offset_(checked(descriptor)->d_member->offset) {}

    PyObject* of(const char* record) const {
        if (PyObject_TypeCheck(reinterpret_cast<PyObject*>(const_cast<char*>(record)), kind_) == 0) {
            throw nb::type_error("a record has another type than the member is of");
        }
        PyObject* found = *reinterpret_cast<PyObject* const*>(record + offset_);
        if (found == nullptr) {
            throw nb::type_error("a record has no such member yet");
        }
        return found;
    }

private:
    static const PyMemberDescrObject* checked(nb::handle descriptor) {
        const auto* found = reinterpret_cast<const PyMemberDescrObject*>(descriptor.ptr());
        if (Py_TYPE(descriptor.ptr()) != &PyMemberDescr_Type || found->d_member->type != T_OBJECT_EX) {
            throw nb::type_error("not the descriptor of a member that is an object");
        }
        return found;
    }

    PyTypeObject* kind_;
    Py_ssize_t offset_;
};

nb::list column(nb::handle records, nb::handle member) {
    const Records all(records);
    const Member one(member);
    nb::list found;
    for (Py_ssize_t i = 0; i < all.size(); ++i) {
        found.append(nb::handle(one.of(all.at(i))));
    }
    return found;
}

nb::bytes words(nb::handle records, nb::handle member) {
    const Records all(records);
    const Member one(member);
    std::vector<std::uint64_t> found;
    found.reserve(static_cast<std::size_t>(all.size()));
    for (Py_ssize_t i = 0; i < all.size(); ++i) {
        found.push_back(PyLong_AsUnsignedLongLong(one.of(all.at(i))));
        if (found.back() == ~std::uint64_t{0} && PyErr_Occurred() != nullptr) {
            throw nb::python_error();
        }
    }
    return nb::bytes(found.data(), found.size() * sizeof(std::uint64_t));
}

bool equal(PyObject* a, PyObject* b) {
    const int found = a == b ? 1 : PyObject_RichCompareBool(a, b, Py_EQ);
    if (found < 0) {
        throw nb::python_error();
    }
    return found != 0;
}

bool columns_equal(nb::handle left, const std::vector<nb::handle>& left_members, nb::handle right,
                   const std::vector<nb::handle>& right_members) {
    const Records a(left);
    const Records b(right);
    if (left_members.size() != right_members.size()) {
        throw nb::value_error("columns_equal: the members are not pairs");
    }
    const std::vector<Member> of_a(left_members.begin(), left_members.end());
    const std::vector<Member> of_b(right_members.begin(), right_members.end());
    if (a.size() != b.size()) {
        return false;
    }
    for (Py_ssize_t i = 0; i < a.size(); ++i) {
        const char* const one = a.at(i);
        const char* const other = b.at(i);
        for (std::size_t member = 0; member < of_a.size(); ++member) {
            if (!equal(of_a[member].of(one), of_b[member].of(other))) {
                return false;
            }
        }
    }
    return true;
}

bool column_is(nb::handle records, nb::handle member, nb::handle value) {
    const Records all(records);
    const Member one(member);
    for (Py_ssize_t i = 0; i < all.size(); ++i) {
        if (one.of(all.at(i)) != value.ptr()) {
            return false;
        }
    }
    return true;
}

}  // namespace

void bind_columns(nb::module_& m) {
    m.def("column", &column, "records"_a, "member"_a);
    m.def("column_words", &words, "records"_a, "member"_a);
    m.def("column_is", &column_is, "records"_a, "member"_a, "value"_a.none());
    m.def("columns_equal", &columns_equal, "left"_a, "left_members"_a, "right"_a, "right_members"_a);
}

}  // namespace ftrain

// Finding a version counter in objects of a shape that nobody told.
#include "anatomy.hpp"

#include <array>
#include <cstdint>
#include <vector>

#include "check.hpp"

using namespace ftrain;
using check::address_of;

namespace {

struct Counter {
    std::uint64_t table = 1;
    std::uint64_t references = 1;
    std::uint32_t version = 0;
    std::uint32_t rest = 0;
};

struct Implementation {
    std::uint64_t table = 2;
    std::uint64_t references = 1;
    std::uint64_t storage = 0;
    std::uint64_t nothing = 0;
    Counter* counter = nullptr;
    std::array<std::uint64_t, 16> others{};
};

struct Object {
    std::uint64_t references = 1;
    std::uint64_t type = 3;
    std::uint64_t flags = 0;
    Implementation* implementation = nullptr;
};

struct Tensor {
    explicit Tensor(std::uint32_t version) {
        counter.version = version;
        implementation.storage = 4096 + version;
        implementation.counter = &counter;
        object.implementation = &implementation;
    }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;

    Specimen specimen() const {
        return {address_of(&object), sizeof object, address_of(&implementation), counter.version};
    }

    Counter counter;
    Implementation implementation;
    Object object;
};

void a_counter_is_found_and_read() {
    Tensor first(3);
    const Tensor second(70);
    const auto found = dissect(std::vector{first.specimen(), second.specimen()});
    CHECK(found.has_value());
    CHECK(found->implementation == 24 && found->counter == 32 && found->version == 16);
    CHECK(found->implementation_of(&first.object) == address_of(&first.implementation));
    const std::uintptr_t counter = found->counter_of(address_of(&first.implementation));
    CHECK(found->version_of(counter) == 3);
    first.counter.version = 4;
    CHECK(found->version_of(counter) == 4);
}

void an_identity_is_that_of_memory_and_counter() {
    Tensor first(3);
    Tensor other(3);
    const Tensor second(70);
    const auto anatomy = dissect(std::vector{first.specimen(), second.specimen()});
    CHECK(anatomy.has_value());
    const std::uintptr_t at = address_of(&first.implementation);
    const std::uint64_t before = anatomy->identity_of(at);
    first.counter.version = 1000;
    first.implementation.references = 5;
    CHECK(anatomy->identity_of(at) == before);
    first.implementation.storage += 1;
    CHECK(anatomy->identity_of(at) != before);
    first.implementation.storage -= 1;
    first.implementation.counter = &other.counter;
    CHECK(anatomy->identity_of(at) != before);
}

void what_fits_twice_or_never_is_not_found() {
    Tensor first(3);
    Tensor second(70);
    CHECK(!dissect({}).has_value());
    Specimen wrong = second.specimen();
    wrong.version = 71;
    CHECK(!dissect(std::vector{first.specimen(), wrong}).has_value());
    wrong = second.specimen();
    wrong.implementation += 8;
    CHECK(!dissect(std::vector{first.specimen(), wrong}).has_value());
    wrong = second.specimen();
    wrong.object_bytes = 24;
    CHECK(!dissect(std::vector{first.specimen(), wrong}).has_value());
    first.counter.rest = 3;
    second.counter.rest = 70;
    CHECK(!dissect(std::vector{first.specimen(), second.specimen()}).has_value());
}

void memory_that_is_not_there_is_not_read() {
    Tensor first(3);
    const Tensor second(70);
    first.implementation.storage = 8;       // no address
    first.implementation.nothing = ~0ULL;   // none, either
    CHECK(dissect(std::vector{first.specimen(), second.specimen()}).has_value());
    CHECK(!dissect(std::vector{Specimen{16, 64, 32, 3}}).has_value());
}

}  // namespace

int main() {
    a_counter_is_found_and_read();
    an_identity_is_that_of_memory_and_counter();
    what_fits_twice_or_never_is_not_found();
    memory_that_is_not_there_is_not_read();
}

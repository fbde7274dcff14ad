#include "machine.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace standin {

namespace {

constexpr std::size_t MARGIN_BYTES = 256;
constexpr std::size_t ALIGNMENT_BYTES = 256;
constexpr char POISON = static_cast<char>(0xDD);
constexpr char MARGIN = static_cast<char>(0xA5);

// [begin, end) pairs that cover `nbytes`, in a random order.
std::vector<std::pair<std::size_t, std::size_t>> slices(Machine& m, std::size_t nbytes) {
    std::vector<std::size_t> cuts{0, nbytes};
    for (std::size_t i = m.below(3); i != 0; --i) {
        cuts.push_back(m.below(nbytes));
    }
    std::sort(cuts.begin(), cuts.end());
    std::vector<std::pair<std::size_t, std::size_t>> parts;
    for (std::size_t i = 1; i < cuts.size(); ++i) {
        parts.emplace_back(cuts[i - 1], cuts[i]);
    }
    std::shuffle(parts.begin(), parts.end(), m.random);
    return parts;
}

bool always() {
    return true;
}

}  // namespace

Machine& machine() {
    static Machine& one = *new Machine;
    return one;
}

Stream* Machine::find_stream(Stream* handle, Context* context) {
    for (const auto& stream : streams) {
        if (stream->context == context && (handle == nullptr ? stream->is_default : stream.get() == handle)) {
            return stream.get();
        }
    }
    if (handle != nullptr) {
        return nullptr;
    }
    streams.push_back(std::make_unique<Stream>(Stream{context, 0, true, false, {}}));
    return streams.back().get();
}

bool Machine::step() {
    std::vector<Stream*> able;
    for (const auto& stream : streams) {
        if (!stream->waiting.empty() && stream->waiting.front().ready()) {
            able.push_back(stream.get());
        }
    }
    if (able.empty()) {
        return false;
    }
    if (const auto awake = std::partition(able.begin(), able.end(), [](Stream* one) { return !one->asleep; });
        awake != able.begin()) {
        able.erase(awake, able.end());
    }
    Stream& chosen = *able[below(able.size())];
    if (chosen.waiting.front().step()) {
        chosen.waiting.pop_front();
        chosen.asleep = chance(8);
    }
    return true;
}

void Machine::wander() {
    for (std::size_t steps = chance(4) ? below(6) : 0; steps != 0; --steps) {
        const bool somebody = std::ranges::any_of(streams, [](const auto& stream) {
            return !stream->asleep && !stream->waiting.empty() && stream->waiting.front().ready();
        });
        if (!somebody || !step()) {
            return;
        }
    }
}

void Machine::push(Stream& stream, Operation operation) {
    if (stream.waiting.empty()) {
        stream.asleep = chance(2);
    }
    stream.waiting.push_back(std::move(operation));
}

void Machine::run_until(std::unique_lock<std::mutex>& lock, const std::function<bool()>& reached) {
    while (!reached()) {
        if (step()) {
            continue;
        }
        if (closed_gates.empty()) {
            std::fprintf(stderr, "stand-in driver: a wait that nothing can end\n");
            std::abort();
        }
        gate_opened.wait(lock);
    }
}

Address Machine::allocate(std::size_t nbytes) {
    auto made = std::make_unique<Allocation>();
    made->memory.assign(nbytes + 2 * MARGIN_BYTES + ALIGNMENT_BYTES, MARGIN);
    const auto begin = reinterpret_cast<std::uintptr_t>(made->memory.data()) + MARGIN_BYTES;
    made->data = reinterpret_cast<char*>((begin + ALIGNMENT_BYTES - 1) / ALIGNMENT_BYTES * ALIGNMENT_BYTES);
    made->nbytes = nbytes;
    std::memset(made->data, POISON, nbytes);
    char* data = made->data;
    device.emplace(data, std::move(made));
    return reinterpret_cast<Address>(data) | DEVICE_BIT;
}

bool Machine::free(Address address) {
    const auto found = device.find(reinterpret_cast<char*>(address & ~DEVICE_BIT));
    if ((address & DEVICE_BIT) == 0 || found == device.end()) {
        return false;
    }
    expect_untouched(found->first, found->second->nbytes, "device memory was freed");
    check_margins(*found->second);
    device.erase(found);
    return true;
}

void Machine::check_margins(const Allocation& allocation) {
    const char* begin = allocation.memory.data();
    const char* end = begin + allocation.memory.size();
    const auto intact = [](char byte) { return byte == MARGIN; };
    if (!std::all_of(begin, const_cast<const char*>(allocation.data), intact) ||
        !std::all_of(const_cast<const char*>(allocation.data) + allocation.nbytes, end, intact)) {
        violations.push_back("something was written beside an allocation of device memory");
    }
}

char* Machine::device_bytes(Address address, std::size_t nbytes) const {
    if ((address & DEVICE_BIT) == 0) {
        return nullptr;
    }
    char* data = reinterpret_cast<char*>(address & ~DEVICE_BIT);
    auto after = device.upper_bound(data);
    if (after == device.begin()) {
        return nullptr;
    }
    const Allocation& allocation = *std::prev(after)->second;
    const auto offset = static_cast<std::size_t>(data - allocation.data);
    return offset <= allocation.nbytes && nbytes <= allocation.nbytes - offset ? data : nullptr;
}

char* Machine::seen_bytes(Address address, std::size_t nbytes) const {
    if ((address & MAPPED_BIT) == 0) {
        return device_bytes(address, nbytes);
    }
    char* data = reinterpret_cast<char*>(address & ~MAPPED_BIT);
    return host_kind(data, nbytes) == Kind::PINNED ? data : nullptr;
}

Machine::Kind Machine::host_kind(const void* data, std::size_t nbytes) const {
    const auto* begin = static_cast<const char*>(data);
    const auto* end = begin + nbytes;
    bool touched = false;
    const auto inside = [&](const char* first, std::size_t length) {
        touched = touched || (begin < first + length && first < end);
        return begin >= first && end <= first + length;
    };
    for (const auto& [first, length] : registered) {
        if (inside(first, length)) {
            return Kind::PINNED;
        }
    }
    for (const auto& [first, allocation] : host) {
        if (inside(first, allocation->nbytes)) {
            return Kind::PINNED;
        }
    }
    return touched ? Kind::TORN : Kind::PAGEABLE;
}

void Machine::copy(Stream& stream, char* to, const char* from, std::size_t nbytes) {
    Operation operation;
    operation.ready = always;
    operation.touches = {{to, nbytes}, {from, nbytes}};
    operation.step = [to, from, parts = slices(*this, nbytes)]() mutable {
        const auto [begin, end] = parts.back();
        std::memcpy(to + begin, from + begin, end - begin);
        parts.pop_back();
        return parts.empty();
    };
    push(stream, std::move(operation));
}

void Machine::mark(Stream& stream, std::shared_ptr<Mark> mark) {
    push(stream, {always, [mark] { return mark->reached = true; }, {}});
}

void Machine::wait_for(Stream& stream, std::shared_ptr<Mark> mark) {
    push(stream, {[mark] { return mark->reached; }, always, {}});
}

void Machine::expect_untouched(const char* begin, std::size_t nbytes, const std::string& what) {
    for (const auto& stream : streams) {
        for (const Operation& operation : stream->waiting) {
            for (const auto& [first, length] : operation.touches) {
                if (first < begin + nbytes && begin < first + length) {
                    violations.push_back(what + " under an operation in flight");
                    return;
                }
            }
        }
    }
}

}  // namespace standin

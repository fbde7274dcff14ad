// The test's hand in the stand-in: what its calls are to do, what they did, and work for the "GPU". No CUDA here.
#include <cstring>

#include "faults.hpp"
#include "machine.hpp"

namespace standin {

Faults& faults() {
    static Faults& all = *new Faults;
    return all;
}

}  // namespace standin

using namespace standin;

extern "C" {

void standin_seed(unsigned long long seed) {
    const std::lock_guard lock(machine().mutex);
    machine().random.seed(seed);
}

void standin_fail(const char* name, unsigned nth, int code) {
    const std::lock_guard lock(machine().mutex);
    faults().plan(name, nth, code);
}

void standin_pause_faults(bool paused) {
    const std::lock_guard lock(machine().mutex);
    faults().paused = paused;
}

unsigned standin_count(const char* name) {
    const std::lock_guard lock(machine().mutex);
    return faults().count(name);
}

// "name count" lines of all functions that were called.
const char* standin_counts() {
    static std::string text;
    const std::lock_guard lock(machine().mutex);
    text.clear();
    for (const auto& [name, count] : faults().counts()) {
        text += name + " " + std::to_string(count) + "\n";
    }
    return text.c_str();
}

// What is there and was not given back yet, as "kind count" lines of those that are not zero.
const char* standin_living() {
    static std::string text;
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    text.clear();
    const auto add = [](const char* kind, std::size_t count) {
        if (count != 0) {
            text += std::string(kind) + " " + std::to_string(count) + "\n";
        }
    };
    std::size_t retained = 0, streams = 0, work = 0;
    for (const auto& [device, context] : m.contexts) {
        retained += static_cast<std::size_t>(context.retained);
    }
    for (const auto& stream : m.streams) {
        streams += stream->is_default ? 0 : 1;
        work += stream->waiting.size();
    }
    add("contexts", retained);
    add("streams", streams);
    add("operations", work);
    add("events", m.events.size());
    add("modules", m.modules.size());
    add("device", m.device.size());
    add("host", m.host.size());
    add("registered", m.registered.size());
    return text.c_str();
}

// One line for each rule that was broken.
const char* standin_violations() {
    static std::string text;
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    text.clear();
    for (const auto& [data, allocation] : m.device) {
        m.check_margins(*allocation);
    }
    for (const std::string& violation : m.violations) {
        text += violation + "\n";
    }
    return text.c_str();
}

// How many streams order themselves after stream 0 without being asked to.
unsigned standin_blocking_streams() {
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    unsigned count = 0;
    for (const auto& stream : m.streams) {
        count += !stream->is_default && (stream->flags & 1U) == 0 ? 1 : 0;
    }
    return count;
}

// Computation: on the stream, the bytes (taken now) come to device memory.
void standin_write(Stream* handle, Context* context, Address to, const char* bytes, std::size_t nbytes) {
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    char* data = m.device_bytes(to, nbytes);
    Operation operation;
    operation.ready = [] { return true; };
    operation.touches = {{data, nbytes}};
    operation.step = [data, content = std::string(bytes, nbytes)] {
        std::memcpy(data, content.data(), content.size());
        return true;
    };
    m.push(*m.find_stream(handle, context), std::move(operation));
}

// Computation: on the stream, device memory is copied to device memory.
void standin_move(Stream* handle, Context* context, Address to, Address from, std::size_t nbytes) {
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    m.copy(*m.find_stream(handle, context), m.device_bytes(to, nbytes), m.device_bytes(from, nbytes), nbytes);
}

// Device memory as it is now, without waiting for anything.
void standin_peek(Address from, char* to, std::size_t nbytes) {
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    std::memcpy(to, m.device_bytes(from, nbytes), nbytes);
}

// Stops the stream here until the gate of the returned number is opened.
unsigned standin_close_gate(Stream* handle, Context* context) {
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    const unsigned gate = ++m.gates;
    m.closed_gates.insert(gate);
    m.push(*m.find_stream(handle, context), {
        [gate] { return !machine().closed_gates.contains(gate); },
        [] { return true; },
        {},
    });
    return gate;
}

void standin_open_gate(unsigned gate) {
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    m.closed_gates.erase(gate);
    m.gate_opened.notify_all();
}

// All work there is, on all streams.
void standin_drain() {
    Machine& m = machine();
    const std::lock_guard lock(m.mutex);
    while (m.step()) {
    }
}

}  // extern "C"

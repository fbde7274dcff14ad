// The stand-in's GPU: memory on the host under addresses that are not the host's, and streams that are late.
//
// Nothing runs until somebody calls: at each call a seeded choice lets some streams take some steps, mostly none, so
// that work comes as late, and in as many orders, as streams and events allow, and whole streams sleep while others run.
// between. Whoever forgets a wait reads what was there before. The same seed gives the same run.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace standin {

using Address = unsigned long long;

// No pointer of the host has these bits: who uses a device address as a pointer crashes at once.
constexpr Address DEVICE_BIT = 1ULL << 61;
constexpr Address MAPPED_BIT = 1ULL << 62;  // pinned host memory as the device sees it

struct Context {
    int device;
    int retained = 0;
};

struct Mark {
    bool reached = false;
};

struct Event {
    Context* context;
    std::shared_ptr<Mark> last;  // of the newest record; none before the first
};

struct Operation {
    std::function<bool()> ready;  // whether it may run now
    std::function<bool()> step;   // runs some of it; true once all is done
    std::vector<std::pair<const char*, std::size_t>> touches;
    const void* module = nullptr;
};

struct Stream {
    Context* context;
    unsigned flags;
    bool is_default;
    bool asleep;  // runs nothing until no other stream can
    std::deque<Operation> waiting;
};

struct Allocation {
    std::vector<char> memory;  // with the margins
    char* data;
    std::size_t nbytes;
};

struct Module;

struct Function {
    std::string name;
    Module* module;
};

struct Module {
    std::map<std::string, Function> functions;
};

class Machine {
public:
    std::mutex mutex;  // held by every exported function
    std::condition_variable gate_opened;
    std::mt19937_64 random{1};
    bool initialized = false;
    std::map<int, Context> contexts;
    std::vector<std::unique_ptr<Stream>> streams;  // oldest first: what runs must depend on the seed, not on addresses
    std::map<Event*, std::unique_ptr<Event>> events;
    std::map<Module*, std::unique_ptr<Module>> modules;
    std::map<char*, std::unique_ptr<Allocation>> device;     // by where it begins
    std::map<char*, std::unique_ptr<Allocation>> host;       // cuMemHostAlloc
    std::map<char*, std::size_t> registered;
    std::set<unsigned> closed_gates;
    unsigned gates = 0;
    std::vector<std::string> violations;

    // The stream of that handle, or of none for stream 0; null where there is no such stream in the context.
    Stream* find_stream(Stream* handle, Context* context);

    bool chance(unsigned one_in) { return random() % one_in == 0; }
    std::size_t below(std::size_t n) { return n == 0 ? 0 : random() % n; }

    // One step of one stream that can take one. False where none can.
    bool step();
    void wander();  // some steps of those that are awake, or none
    void push(Stream& stream, Operation operation);
    void run_until(std::unique_lock<std::mutex>& lock, const std::function<bool()>& reached);

    Address allocate(std::size_t nbytes);
    bool free(Address address);
    // The bytes behind a device address, or null where not all of them are in one living allocation.
    char* device_bytes(Address address, std::size_t nbytes) const;
    // As the device sees memory: its own, or the host's that is mapped.
    char* seen_bytes(Address address, std::size_t nbytes) const;
    enum class Kind { PAGEABLE, PINNED, TORN };  // TORN: some of it is pinned
    Kind host_kind(const void* data, std::size_t nbytes) const;

    void copy(Stream& stream, char* to, const char* from, std::size_t nbytes);
    void mark(Stream& stream, std::shared_ptr<Mark> mark);
    void wait_for(Stream& stream, std::shared_ptr<Mark> mark);
    // Notes a violation for each operation that has yet to touch the memory.
    void expect_untouched(const char* begin, std::size_t nbytes, const std::string& what);
    void check_margins(const Allocation& allocation);
};

Machine& machine();

}  // namespace standin

#include "gloo_waits.hpp"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace ftrain {

namespace {

// Of gloo::transport::tcp::UnboundBuffer, whose waits every collective and every send and receive goes through.
constexpr const char* LIBRARY = "libtorch_cpu.so";
constexpr const char* TABLE = "_ZTVN4gloo9transport3tcp13UnboundBufferE";
constexpr const char* WAIT_RECEIVED =
    "_ZN4gloo9transport3tcp13UnboundBuffer8waitRecvEPiNSt6chrono8durationIlSt5ratioILl1ELl1000EEEE";
constexpr const char* WAIT_SENT =
    "_ZN4gloo9transport3tcp13UnboundBuffer8waitSendEPiNSt6chrono8durationIlSt5ratioILl1ELl1000EEEE";
constexpr const char* FAIL = "_ZN4gloo9transport3tcp13UnboundBuffer15signalExceptionENSt15__exception_ptr13exception_ptrE";

// Member functions, whose first argument is the object.
using Wait = bool (*)(void* buffer, int* rank, std::chrono::milliseconds timeout);
using Fail = void (*)(void* buffer, std::exception_ptr error);

struct Gloo {
    Wait wait_received = nullptr;
    Wait wait_sent = nullptr;
    Fail fail = nullptr;
    std::mutex mutex;
    std::vector<void*> waiting;
    bool is_listing = false;
};

Gloo& gloo() {
    static auto* only = new Gloo;  // never destroyed: a thread may still wait while the process ends
    return *only;
}

class Listed {
public:
    explicit Listed(void* buffer) : buffer_(buffer) {
        const std::lock_guard lock(gloo().mutex);
        gloo().waiting.push_back(buffer_);
    }
    ~Listed() {
        const std::lock_guard lock(gloo().mutex);
        std::vector<void*>& waiting = gloo().waiting;
        waiting.erase(std::find(waiting.begin(), waiting.end(), buffer_));
    }
    Listed(const Listed&) = delete;
    Listed& operator=(const Listed&) = delete;

private:
    void* buffer_;
};

bool wait_received(void* buffer, int* rank, std::chrono::milliseconds timeout) {
    const Listed listed(buffer);
    return gloo().wait_received(buffer, rank, timeout);
}

bool wait_sent(void* buffer, int* rank, std::chrono::milliseconds timeout) {
    const Listed listed(buffer);
    return gloo().wait_sent(buffer, rank, timeout);
}

std::span<std::uintptr_t> slots_of(void* table) {
    Dl_info info{};
    const ElfW(Sym)* symbol = nullptr;
    if (dladdr1(table, &info, reinterpret_cast<void**>(const_cast<ElfW(Sym)**>(&symbol)), RTLD_DL_SYMENT) == 0 ||
        symbol == nullptr || info.dli_saddr != table) {
        return {};
    }
    return {static_cast<std::uintptr_t*>(table), symbol->st_size / sizeof(std::uintptr_t)};
}

// The only slot that holds the function, null where there are none or several.
std::uintptr_t* slot_of(std::span<std::uintptr_t> slots, void* function) {
    const auto address = reinterpret_cast<std::uintptr_t>(function);
    const auto found = std::find(slots.begin(), slots.end(), address);
    return std::count(slots.begin(), slots.end(), address) == 1 ? &*found : nullptr;
}

// What mprotect(2) calls the protection of the memory there.
std::optional<int> protection_of(std::uintptr_t address) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        std::uintptr_t begin = 0;
        std::uintptr_t end = 0;
        char mode[5] = {};
        if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s", &begin, &end, mode) == 3 && begin <= address &&
            address < end) {
            return (mode[0] == 'r' ? PROT_READ : 0) | (mode[1] == 'w' ? PROT_WRITE : 0) | (mode[2] == 'x' ? PROT_EXEC : 0);
        }
    }
    return std::nullopt;
}

// The table lies in memory that the loader has made read-only.
bool put(std::uintptr_t* slot, Wait function) {
    const auto page_bytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<std::uintptr_t>(slot);
    void* page = reinterpret_cast<void*>(address - address % page_bytes);  // NOLINT(performance-no-int-to-ptr)
    const std::optional<int> before = protection_of(address);
    if (!before.has_value() || mprotect(page, page_bytes, *before | PROT_WRITE) != 0) {
        return false;
    }
    __atomic_store_n(slot, reinterpret_cast<std::uintptr_t>(function), __ATOMIC_RELEASE);
    mprotect(page, page_bytes, *before);
    return true;
}

}  // namespace

bool list_gloo_waits() {
    Gloo& found = gloo();
    const std::lock_guard lock(found.mutex);
    if (found.is_listing) {
        return true;
    }
    void* library = dlopen(LIBRARY, RTLD_NOLOAD | RTLD_LAZY);  // kept: the table refers to this module from here on
    if (library == nullptr) {
        return false;
    }
    void* table = dlsym(library, TABLE);
    void* received = dlsym(library, WAIT_RECEIVED);
    void* sent = dlsym(library, WAIT_SENT);
    void* fail = dlsym(library, FAIL);
    if (table == nullptr || received == nullptr || sent == nullptr || fail == nullptr) {
        return false;
    }
    const std::span<std::uintptr_t> slots = slots_of(table);
    std::uintptr_t* received_slot = slot_of(slots, received);
    std::uintptr_t* sent_slot = slot_of(slots, sent);
    if (received_slot == nullptr || sent_slot == nullptr) {
        return false;
    }
    found.wait_received = reinterpret_cast<Wait>(received);
    found.wait_sent = reinterpret_cast<Wait>(sent);
    found.fail = reinterpret_cast<Fail>(fail);
    found.is_listing = put(received_slot, wait_received) && put(sent_slot, wait_sent);
    return found.is_listing;
}

std::size_t end_gloo_waits(const std::string& message) {
    Gloo& found = gloo();
    const std::lock_guard lock(found.mutex);
    for (void* buffer : found.waiting) {
        found.fail(buffer, std::make_exception_ptr(std::runtime_error(message)));
    }
    return found.waiting.size();
}

}  // namespace ftrain

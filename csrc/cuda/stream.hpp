// Streams and events that are destroyed with their owner. All but the destructors need the context to be current.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "context.hpp"

namespace ftrain::cuda {

class Event {
public:
    explicit Event(const Context& context);
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    void record(StreamHandle stream);       // marks what is on the stream now
    void order(StreamHandle later) const;   // what comes to `later` from now on waits, on the device, for the mark
    bool done() const;
    void wait() const;                      // the thread sleeps until the mark is reached
    bool wait_quietly() const noexcept;     // false where that cannot be told

private:
    const Context& context_;
    EventHandle handle_ = nullptr;
};

// The stream for copies: of the lowest priority, so that work on the compute streams goes first.
class Stream {
public:
    explicit Stream(const Context& context);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    StreamHandle handle() const noexcept { return handle_; }
    void wait_quietly() const noexcept;

private:
    const Context& context_;
    StreamHandle handle_ = nullptr;
};

// Events to be used again, so that the steady state makes none.
class EventPool {
public:
    explicit EventPool(const Context& context) : context_(context) {}

    std::unique_ptr<Event> take();
    void give(std::unique_ptr<Event> event) noexcept;

private:
    static constexpr std::size_t KEPT_MAX = 64;

    const Context& context_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Event>> free_;
};

}  // namespace ftrain::cuda

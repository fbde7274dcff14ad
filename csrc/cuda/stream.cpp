#include "stream.hpp"

namespace ftrain::cuda {

Event::Event(const Context& context) : context_(context) {
    context.check(context.call().cuEventCreate(&handle_, EVENT_BLOCKING_SYNC | EVENT_DISABLE_TIMING), "making an event");
}

Event::~Event() {
    quietly(context_, [this](const Table& call) { call.cuEventDestroy_v2(handle_); });
}

void Event::record(StreamHandle stream) {
    context_.check(context_.call().cuEventRecord(handle_, stream), "marking a place in a stream");
}

void Event::order(StreamHandle later) const {
    context_.check(context_.call().cuStreamWaitEvent(later, handle_, 0), "ordering a stream after an event");
}

bool Event::done() const {
    const Outcome outcome = context_.call().cuEventQuery(handle_);
    if (outcome.result == NOT_READY) {
        return false;
    }
    context_.check(outcome, "asking whether copies are done");
    return true;
}

void Event::wait() const {
    context_.check(context_.call().cuEventSynchronize(handle_), "waiting for copies");
}

bool Event::wait_quietly() const noexcept {
    bool reached = false;
    quietly(context_, [&](const Table& call) { reached = call.cuEventSynchronize(handle_).result == SUCCESS; });
    return reached;
}

Stream::Stream(const Context& context) : context_(context) {
    int least = 0;
    int greatest = 0;
    context.check(context.call().cuCtxGetStreamPriorityRange(&least, &greatest), "asking for the stream priorities");
    context.check(context.call().cuStreamCreateWithPriority(&handle_, STREAM_NON_BLOCKING, least),
                  "making the stream for copies");
}

Stream::~Stream() {
    quietly(context_, [this](const Table& call) {
        call.cuStreamSynchronize(handle_);
        call.cuStreamDestroy_v2(handle_);
    });
}

void Stream::wait_quietly() const noexcept {
    quietly(context_, [this](const Table& call) { call.cuStreamSynchronize(handle_); });
}

std::unique_ptr<Event> EventPool::take() {
    {
        const std::lock_guard lock(mutex_);
        if (!free_.empty()) {
            std::unique_ptr<Event> event = std::move(free_.back());
            free_.pop_back();
            return event;
        }
        free_.reserve(KEPT_MAX);
    }
    return std::make_unique<Event>(context_);
}

void EventPool::give(std::unique_ptr<Event> event) noexcept {
    const std::lock_guard lock(mutex_);
    if (event && free_.size() < KEPT_MAX) {
        free_.push_back(std::move(event));
    }
}

}  // namespace ftrain::cuda

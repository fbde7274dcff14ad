// The primary context of one device: the one that torch works in, so that streams and addresses are shared with it.
#pragma once

#include <string>

#include "driver.hpp"

namespace ftrain::cuda {

class Context {
public:
    Context(const Driver& driver, int ordinal);
    ~Context();
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    const Driver& driver() const noexcept { return driver_; }
    const Table& call() const noexcept { return driver_.call(); }
    int ordinal() const noexcept { return ordinal_; }
    ContextHandle handle() const noexcept { return handle_; }
    int attribute(int which, const std::string& name) const;

    // As Driver::check, with the device named.
    void check(Outcome outcome, const char* attempt) const {
        if (outcome.result != SUCCESS) {
            fail(outcome, attempt);
        }
    }
    [[noreturn]] void fail(Outcome outcome, const std::string& attempt) const;

private:
    const Driver& driver_;
    int ordinal_;
    Device device_ = 0;
    ContextHandle handle_ = nullptr;
};

// Makes the context this thread's own for a scope, and gives back the one before. Every call below needs it.
class Current {
public:
    explicit Current(const Context& context);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

private:
    const Context& context_;
};

// Runs `act(table)` in the context, for destructors: not at all in a forked child, and without a throw.
template <class Act>
void quietly(const Context& context, Act&& act) noexcept {
    ContextHandle before = nullptr;
    if (context.driver().is_ours() && context.call().cuCtxPushCurrent_v2(context.handle()).result == SUCCESS) {
        act(context.call());
        context.call().cuCtxPopCurrent_v2(&before);
    }
}

}  // namespace ftrain::cuda

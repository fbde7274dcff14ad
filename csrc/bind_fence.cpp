// When whatever native code the main thread is in right now has come to its end.
#include <nanobind/nanobind.h>

#include <condition_variable>
#include <memory>
#include <mutex>

#include "bindings.hpp"

namespace nb = nanobind;

namespace ftrain {

namespace {

// The interpreter calls back in the main thread, between two instructions of Python.
class Fence {
public:
    // False where it takes no more calls at the moment.
    bool set() {
        auto held = std::make_unique<std::shared_ptr<State>>(state_);
        if (Py_AddPendingCall(&Fence::pass, held.get()) != 0) {
            return false;
        }
        (void)held.release();  // the call's own
        return true;
    }

    bool wait() {
        const std::shared_ptr<State> state = state_;
        std::unique_lock lock(state->mutex);
        state->changed.wait(lock, [&] { return state->passed || state->dropped; });
        return !state->dropped;
    }

    void drop() {
        {
            const std::lock_guard lock(state_->mutex);
            state_->dropped = true;
        }
        state_->changed.notify_all();
    }

private:
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        bool passed = false;
        bool dropped = false;
    };

    static int pass(void* argument) {
        const std::unique_ptr<std::shared_ptr<State>> held(static_cast<std::shared_ptr<State>*>(argument));
        {
            const std::lock_guard lock((*held)->mutex);
            (*held)->passed = true;
        }
        (*held)->changed.notify_all();
        return 0;
    }

    std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace

void bind_fence(nb::module_& m) {
    nb::class_<Fence>(m, "Fence")
        .def(nb::init<>())
        .def("set", &Fence::set)
        .def("wait", &Fence::wait, nb::call_guard<nb::gil_scoped_release>())
        .def("drop", &Fence::drop);
}

}  // namespace ftrain

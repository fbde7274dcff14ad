#include "context.hpp"

namespace ftrain::cuda {

Context::Context(const Driver& driver, int ordinal) : driver_(driver), ordinal_(ordinal) {
    check(call().cuDeviceGet(&device_, ordinal), "finding the device");
    check(call().cuDevicePrimaryCtxRetain(&handle_, device_), "taking the primary context");
}

Context::~Context() {
    if (driver_.is_ours()) {
        call().cuDevicePrimaryCtxRelease_v2(device_);
    }
}

int Context::attribute(int which, const std::string& name) const {
    int value = 0;
    const Outcome outcome = call().cuDeviceGetAttribute(&value, which, device_);
    if (outcome.result != SUCCESS) {
        fail(outcome, "asking for the " + name);
    }
    return value;
}

void Context::fail(Outcome outcome, const std::string& attempt) const {
    driver_.fail(outcome, attempt + " on device " + std::to_string(ordinal_));
}

Current::Current(const Context& context) : context_(context) {
    context.driver().require_ours();
    context.check(context.call().cuCtxPushCurrent_v2(context.handle()), "entering the context");
}

Current::~Current() {
    ContextHandle ours = nullptr;
    context_.call().cuCtxPopCurrent_v2(&ours);
}

}  // namespace ftrain::cuda

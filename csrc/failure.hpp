// What goes wrong in here, without knowing Python: module.cpp turns it into OSError, EOFError and the like.
#pragma once

#include <stdexcept>
#include <string>

namespace ftrain {

// A system call failed: its errno and what was attempted.
class SystemFailure : public std::runtime_error {
public:
    SystemFailure(int code, const std::string& attempt) : std::runtime_error(attempt), code_(code) {}
    int code() const noexcept { return code_; }

private:
    int code_;
};

// The file ended before all that was asked for had been read.
class ShortFile : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Called after a signal interrupted a system call; it returns to go on, and throws to give up.
using OnInterrupt = void (*)();

}  // namespace ftrain

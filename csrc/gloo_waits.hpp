// gloo's waits for a peer, ended from outside.
//
// Where a connection breaks in the middle of a message, gloo (as of torch 2.13) does not tell whoever waits for that message: only
// for what has not begun to arrive or to leave. Such a wait goes on until its timeout, ten minutes. So the two functions in which
// gloo waits are listed here while somebody is in them, by way of gloo's own table of virtual functions, and can be told that they failed.
#pragma once

#include <cstddef>
#include <string>

namespace ftrain {

// Lists waits from now on. False where this process has no gloo, or one that is not built as it is known here: then nothing is changed.
bool list_gloo_waits();

// Ends all listed waits, which raise a std::runtime_error of `message`. Returns how many there were.
std::size_t end_gloo_waits(const std::string& message);

}  // namespace ftrain

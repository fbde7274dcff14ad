#include "process.hpp"

#include <sys/prctl.h>

#include <cerrno>
#include <string>

#include "failure.hpp"

namespace ftrain {

void set_parent_death_signal(int signum) {
    if (prctl(PR_SET_PDEATHSIG, static_cast<unsigned long>(signum), 0UL, 0UL, 0UL) != 0) {
        throw SystemFailure(errno, "asking for signal " + std::to_string(signum) + " at the parent's death");
    }
}

void set_child_subreaper(bool on) {
    if (prctl(PR_SET_CHILD_SUBREAPER, on ? 1UL : 0UL, 0UL, 0UL, 0UL) != 0) {
        throw SystemFailure(errno, "becoming the reaper of orphaned descendants");
    }
}

}  // namespace ftrain

#include "process.hpp"

#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
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

namespace {

void end_if_asked_by_a_relative(int, siginfo_t* info, void*) {
    if (info->si_pid == getppid() || info->si_pid == getpid()) {
        _exit(EXIT_SUCCESS);
    }
}

}  // namespace

void leave_sigterm_to_parent() {
    struct sigaction action {};
    action.sa_sigaction = &end_if_asked_by_a_relative;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGTERM, &action, nullptr) != 0) {
        throw SystemFailure(errno, "leaving SIGTERM to the parent");
    }
}

}  // namespace ftrain

// What a process asks of the kernel about its relatives.
#pragma once

namespace ftrain {

// The calling process gets `signum` when the thread that made it ends; 0 for no signal. Not inherited by its children.
// The parent may be gone already: compare os.getppid() after this call.
void set_parent_death_signal(int signum);

// Orphans among our descendants become our children, so that none escapes.
void set_child_subreaper(bool on);

// SIGTERM ends the calling process, with code 0, only where its parent or the process itself sent it; that of anybody
// else, as to all processes of a job at once, is the parent's to answer. A program that is executed gets the default.
void leave_sigterm_to_parent();

}  // namespace ftrain

// What a process asks of the kernel about its relatives.
#pragma once

namespace ftrain {

// The calling process gets `signum` when the thread that made it ends; 0 for no signal. Not inherited by its children.
// The parent may be gone already: compare os.getppid() after this call.
void set_parent_death_signal(int signum);

// Orphans among our descendants become our children, so that none escapes.
void set_child_subreaper(bool on);

}  // namespace ftrain

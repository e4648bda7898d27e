// What every thread of this process is doing, for a job that hangs.
#pragma once

namespace itwin::worker {

// Writes the stack of every thread but the caller's to the file descriptor. Threads that do not
// answer within a moment are named as such. Interrupts them by a signal: system calls go on.
void WriteThreadStacks(int fd);

}  // namespace itwin::worker

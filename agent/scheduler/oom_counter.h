#pragma once

#include <cstdint>
#include <string>

namespace itwin::agent {

// How many processes the kernel has killed for lack of memory: of this process's control group with those below it, or,
// where no group counts them, of the whole machine. Two readings around a program's life are the evidence for "out of
// memory"; a SIGKILL alone is none, for anybody may send one.
class OomCounter {
 public:
  // The roots are arguments for tests.
  explicit OomCounter(std::string proc = "/proc", std::string cgroup = "/sys/fs/cgroup");

  int64_t Read() const;
  // The group's own count, not the machine's.
  bool of_group() const { return of_group_; }

 private:
  std::string path_;  // of the file with a line "oom_kill <n>"; "" when there is none
  bool of_group_ = false;
};

}  // namespace itwin::agent

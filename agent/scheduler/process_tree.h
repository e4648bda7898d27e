#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

#include "absl/time/time.h"

// Processes of this machine, read from /proc.
namespace itwin::agent {

// A process that cannot be confused with a later one of the same number.
struct ProcessIdentity {
  std::string boot_id = {};
  pid_t pid = 0;
  int64_t start_ticks = 0;  // since boot
  friend bool operator==(const ProcessIdentity&, const ProcessIdentity&) = default;
};

// Of a living process; pid 0 is ourselves. start_ticks is 0 when there is none.
ProcessIdentity IdentityOf(pid_t pid);
// Alive, the same one, on this boot of this machine; a zombie is not alive.
bool IsAlive(const ProcessIdentity& identity);

// Living processes below `ancestor`, not itself.
std::vector<pid_t> DescendantsOf(pid_t ancestor);

// Processes of this user that carry `NAME=value` in the environment they were started with, or belong to the
// session `session` (0: none), ourselves excepted.
std::vector<pid_t> ProcessesMarked(const std::string& variable, pid_t session);

// SIGKILLs what `find` returns until it returns nothing, or the limit is over. Returns whether nothing is left.
bool KillAll(const std::function<std::vector<pid_t>()>& find, absl::Duration limit);

std::string HostName();

}  // namespace itwin::agent

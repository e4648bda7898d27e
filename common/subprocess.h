#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

// The only place that forks. argv goes to the program as it is; no shell is involved.
namespace itwin {

struct SubprocessOptions {
  std::vector<std::string> argv = {};  // argv[0] is looked up in PATH when it has no '/'
  std::string directory = {};          // working directory; "" for ours
  // Added to (or replacing in) our environment; with `clear_env` they are all there is.
  std::vector<std::pair<std::string, std::string>> env = {};
  bool clear_env = false;
  // Descriptors that become 0, 1, 2 of the child; -1 is /dev/null. They stay owned by the caller.
  int stdin_fd = -1;
  int stdout_fd = -1;
  int stderr_fd = -1;
  bool die_with_parent = false;  // SIGKILL when the thread that starts it ends, however that comes about
  bool new_session = false;  // setsid: outlives our terminal and is a process group of its own
};

struct ExitStatus {
  int exit_code = 0;  // when signal is 0
  int signal = 0;
};

// A started child. Not thread-safe. The destructor neither kills nor waits: the owner decides.
class Subprocess {
 public:
  // kNotFound / kPermissionDenied when the program cannot be executed, kResourceExhausted when the system has no room.
  static absl::StatusOr<Subprocess> Start(const SubprocessOptions& options);

  pid_t pid() const { return pid_; }
  // The exit, or nothing when it still runs. After an exit was returned, it is returned again.
  std::optional<ExitStatus> Poll();
  // Blocks until the exit or the deadline.
  std::optional<ExitStatus> Wait(absl::Time deadline);
  // To the process (or, with `group`, its process group); harmless after its exit.
  void Kill(int signal, bool group = false);

 private:
  explicit Subprocess(pid_t pid) : pid_(pid) {}
  pid_t pid_;
  std::optional<ExitStatus> exit_;
};

struct CommandOutput {
  ExitStatus exit;
  std::string out;
  std::string err;
  bool truncated = false;  // one of them was longer than the limit
};
// Runs to the end, keeping at most `max_output` bytes of each stream. kDeadlineExceeded: it was killed.
absl::StatusOr<CommandOutput> RunCommand(SubprocessOptions options, absl::Duration limit,
                                         size_t max_output = 4 << 20);

}  // namespace itwin

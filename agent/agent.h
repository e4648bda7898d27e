#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/scheduler/launch.h"

namespace itwin::agent {

// The daemon of one spool root, put together: scheduler, loops, gRPC server, socket. All its state is the spool;
// it can be killed at any moment and started again.
class Agent {
 public:
  struct Options {
    std::string root = {};           // absolute
    std::string scheduler = "process";  // or "slurm", or "auto": slurm where sbatch is found
    int slots = 1;              // process scheduler: ranks that may run at once
    std::string agent_program = {};  // this program, for the scripts of attempts
    LaunchOptions launch = {};
    // How long to wait for an agent on another host, which is asked to leave; 0: not at all.
    absl::Duration takeover_limit = absl::ZeroDuration();
    // Inputs that no attempt links to and nobody has asked for so long are removed. Infinite: never.
    absl::Duration input_retention = absl::Hours(24 * 7);
    // Without connections and unfinished attempts for this long, Wait returns.
    absl::Duration idle_exit = absl::InfiniteDuration();
    // After SIGTERM, for calls under way; callers ask again, and connections that stay open are cut then.
    absl::Duration stop_limit = absl::Seconds(1);
  };
  // On return connections are accepted. kAlreadyExists: another agent serves the root. kInvalidArgument: an option.
  static absl::StatusOr<std::unique_ptr<Agent>> Start(Options options);
  ~Agent();  // Stop()

  // Returns when `signal_fd` becomes readable, the agent has been idle for long enough, its root was
  // removed, it was asked to retire, or an agent on another host takes over.
  void Wait(int signal_fd);
  // Ends calls and loops; attempts go on. Idempotent.
  void Stop();

  const std::string& socket_path() const;

 private:
  struct Parts;
  explicit Agent(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace itwin::agent

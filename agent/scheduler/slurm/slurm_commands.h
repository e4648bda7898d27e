#pragma once

#include <deque>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/subprocess.h"

namespace itwin::agent {

// SLURM's commands on this host: found once, run with absolute paths, without a shell, in an environment in which
// nothing of the user's changes their output. Thread-safe.
class SlurmCommands {
 public:
  // Absolute paths; empty for one that the host lacks.
  struct Programs {
    std::string sbatch = {};
    std::string squeue = {};
    std::string scancel = {};
    std::string scontrol = {};
    std::string sinfo = {};
    std::string sacct = {};
    std::string srun = {};
  };
  // In `path` (as PATH), then where sites put SLURM. kNotFound without sbatch, squeue, scancel or scontrol; says where it looked.
  static absl::StatusOr<Programs> Find(const std::string& path);

  explicit SlurmCommands(Programs programs) : programs_(std::move(programs)) {}
  const Programs& programs() const { return programs_; }

  // As RunCommand. kNotFound when the host lacks the program.
  absl::StatusOr<CommandOutput> Run(const std::string& program, std::vector<std::string> arguments, absl::Duration limit);

  // Since the start, and over the last five minutes.
  int64_t calls() const;
  double calls_per_minute() const;

 private:
  const Programs programs_;
  mutable absl::Mutex mu_;
  int64_t calls_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time first_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  mutable std::deque<absl::Time> recent_ ABSL_GUARDED_BY(mu_);
};

// Both streams in one line, for a user.
std::string WordsOf(const CommandOutput& output);

}  // namespace itwin::agent

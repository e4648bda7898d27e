#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "agent/scheduler/scheduler.h"

// How an attempt is handed to sbatch. Pure.
namespace itwin::agent {

// What the script and the request need to know of the site.
struct BatchSite {
  int version = 0;                                   // as VersionNumber()
  absl::Duration kill_wait = absl::Seconds(30);      // from SLURM's SIGTERM to its SIGKILL
};

// The options for sbatch, one argv word each, without the program and the script: no shell and no #SBATCH line is
// involved, so a value cannot become another option. kInvalidArgument: a setting holds what no such value holds.
// `name` is the SLURM job's: by it alone attempts are found again.
absl::StatusOr<std::vector<std::string>> SbatchOptions(const Submission& submission, const std::string& name);
// The time that SLURM grants for it: whole minutes, rounded up; 0 when the site's default holds.
absl::Duration GrantedTime(const Submission& submission);
// What two submissions have in common when one preflight is good for both.
std::string ShapeOf(const std::vector<std::string>& options);

// The script given to sbatch: cleans SLURM's variables where nested steps would inherit wrong limits, tells the
// supervisor how long it has, and becomes script.sh. Whatever the names in it, bash runs no other command.
std::string RenderBatchScript(const Submission& submission, const BatchSite& site);

}  // namespace itwin::agent

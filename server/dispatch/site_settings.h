#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "itwin/agent/v1/agent.pb.h"
#include "itwin/v1/spec.pb.h"
#include "server/dispatch/worker_operators.h"

// What a site's administrator says about its jobs, and what follows from it for one of them: pure.
namespace itwin::server {

// Limits beyond those that SLURM tells; 0 and InfiniteDuration: none.
struct PartitionLimits {
  std::string name;
  absl::Duration max_time = absl::InfiniteDuration();
  int max_nodes = 0;
  int cpus_per_node = 0;
  int64_t memory_mib_per_node = 0;
  int gpus_per_node = 0;
};

struct SiteSettings {
  std::string scheduler;  // "process", "slurm"; "": whatever the agent runs
  agent::v1::LaunchSettings launch;                       // `container` as it is written: {image} may stand in it
  std::string image;                                      // for jobs that name none
  agent::v1::SlurmSettings slurm;                         // defaults of what a job may say, and gpu_request, options, signal_before
  absl::Duration default_time = absl::ZeroDuration();     // zero: one hour
  int64_t default_memory_mib = 0;                         // 0: the cluster's
  std::vector<PartitionLimits> partitions;                // when there are any, one of them is taken; in order of preference
  // What a job may say; nothing: everything. `options` are names of sbatch's: "--licenses".
  std::optional<std::vector<std::string>> allowed_partitions, allowed_accounts, allowed_qos, allowed_reservations,
      allowed_constraints;
  std::vector<std::string> allowed_options;
  std::shared_ptr<WorkerOperators> worker_operators;      // null: only the worker knows
};

// Everything that is asked of SLURM for one job. kFailedPrecondition: the site will never run it; the message is a sentence
// with the limit and the next step. `facts` may be null: not known yet, and then only the site's own rules are checked.
struct SlurmPlan {
  agent::v1::SlurmSettings slurm;
  int64_t memory_mib_per_node = 0;
  absl::Duration time = absl::Hours(1);
};
absl::StatusOr<SlurmPlan> PlanForSlurm(const std::string& site, const SiteSettings& settings,
                                       const agent::v1::SlurmFacts* facts, const v1::Resources& resources);

// The site's `container` line with the job's image (JobSpec.image; "": the site's default) in the place of {image}.
// kFailedPrecondition: the line has no place for it, or a place and nothing to put there; the message says what to do.
absl::StatusOr<std::string> ContainerLine(const std::string& site, const SiteSettings& settings, const std::string& image);

// Whether the job says something that only SLURM understands; its name, for a message.
std::optional<std::string> SlurmOnlyField(const v1::Resources& resources);

}  // namespace itwin::server

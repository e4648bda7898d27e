#pragma once

#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/ids.h"
#include "itwin/agent/v1/agent.pb.h"
#include "server/artifacts/blob_store.h"
#include "server/dispatch/agent_client.h"
#include "server/dispatch/reconciler.h"
#include "server/dispatch/site_settings.h"
#include "server/store/job_store.h"

// What is done at a site on behalf of a job: straight-line code for a worker's thread. Each may be repeated at any
// time, after any interruption.
namespace itwin::server {

inline constexpr size_t kMaxOutputFiles = 10'000;
inline constexpr int64_t kInputChunkBytes = 512 << 10;

// Inputs on their way to one site: two jobs with the same input send it once. Thread-safe.
class SendingInputs {
 public:
  // Waits until nobody else sends it; true: the caller does now, and calls End.
  bool Begin(const std::string& sha256, absl::Time deadline);
  void End(const std::string& sha256);

 private:
  absl::Mutex mu_;
  absl::flat_hash_set<std::string> sending_ ABSL_GUARDED_BY(mu_);
};

struct ErrandContext {
  JobStore* store;
  BlobStore* blobs;
  AgentClient* agent;
  absl::Duration call_timeout;
  absl::Duration transfer_stall;
};

// Every input of the spec is at the site afterwards. kNotFound: the gateway lacks one, named; kResourceExhausted: no
// room at the site.
absl::Status SendInputs(const ErrandContext& context, const JobId& job, SendingInputs* sending);

// What the site adds to a request: its name and file, and what it said of its SLURM (null: it has none).
struct StartSite {
  std::string name;
  const SiteSettings* settings;
  const agent::v1::SlurmFacts* slurm;
};

// All of it comes from stored rows and the site's file. kFailedPrecondition: the site's rules or limits are against it now.
absl::StatusOr<agent::v1::StartAttemptRequest> MakeStartRequest(JobStore* store, const AttemptKey& attempt,
                                                                int64_t log_limit_bytes, const StartSite& site);
// The pure part: what a job's spec becomes at a site. `resume_attempt`: "" for a fresh start.
absl::StatusOr<agent::v1::StartAttemptRequest> StartRequestOf(const v1::JobSpec& spec, const AttemptKey& attempt,
                                                              const std::string& resume_attempt, int64_t log_limit_bytes,
                                                              const StartSite& site);

// Keeps the attempt away from nodes that failed earlier ones at its site (failure_signs.h), as far as the partition it
// asks for has others.
void AvoidBadNodes(JobStore* store, const agent::v1::SlurmFacts& facts, agent::v1::StartAttemptRequest* request);

// One file below outputs/ is in the blob store afterwards, its hash checked. kDataLoss: it is damaged or its name is not
// acceptable.
absl::StatusOr<v1::OutputFile> BringOutput(const ErrandContext& context, const AttemptKey& attempt,
                                           const agent::v1::FileEntry& file);

// All output files are in the blob store afterwards, hashes checked. kDataLoss: one is damaged or its name is not
// acceptable; kFailedPrecondition: too many.
absl::StatusOr<Collected> BringOutputs(const ErrandContext& context, const AttemptKey& attempt);

}  // namespace itwin::server

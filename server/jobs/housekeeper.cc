#include "server/jobs/housekeeper.h"

#include <string>

#include "common/log.h"

namespace itwin::server {
namespace {

// Of one turn: others write between two, and a stop does not wait long.
constexpr int kMaxJobsPerTurn = 100;

}  // namespace

absl::Time Housekeeper::RunOnce() {
  const absl::Time now = clock_.Now();
  if (options_.job_retention <= absl::ZeroDuration()) return absl::InfiniteFuture();
  const absl::StatusOr<int> removed = store_.RemoveFinished(now - options_.job_retention, kMaxJobsPerTurn);
  if (!removed.ok()) {
    log::Warn("old jobs are not removed: {}", std::string(removed.status().message()));
  } else if (*removed > 0) {
    log::Info("removed {} jobs that ended more than {} ago", *removed, absl::FormatDuration(options_.job_retention));
    if (*removed == kMaxJobsPerTurn) return now;
  }
  return now + options_.interval;
}

void Housekeeper::Start() {
  if (options_.job_retention <= absl::ZeroDuration()) return;
  thread_ = std::thread([this] {
    while (true) {
      const absl::Time wake = RunOnce();
      absl::MutexLock lock(&mu_);
      if (clock_.AwaitUntil(mu_, absl::Condition(&stopping_), wake)) return;
    }
  });
}

void Housekeeper::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

}  // namespace itwin::server

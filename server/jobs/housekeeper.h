#pragma once

#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "server/store/job_store.h"

namespace itwin::server {

// Removes finished jobs once they have been kept as long as the admin wants. One thread; without a retention, none.
class Housekeeper {
 public:
  struct Options {
    absl::Duration job_retention = absl::ZeroDuration();  // zero: for ever
    absl::Duration interval = absl::Hours(1);
  };
  // Both must outlive it.
  Housekeeper(const Options& options, JobStore* store, Clock* clock) : options_(options), store_(*store), clock_(*clock) {}
  ~Housekeeper() { Stop(); }

  void Start();
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);  // idempotent; joins
  // What is due now; returns when it wants to be called again.
  absl::Time RunOnce();

 private:
  const Options options_;
  JobStore& store_;
  Clock& clock_;
  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace itwin::server

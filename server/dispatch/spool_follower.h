#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "server/dispatch/agent_client.h"
#include "server/dispatch/spool_ingest.h"
#include "server/store/job_store.h"

namespace itwin::server {

// Reads one Follow stream on a thread of its own: chunks go into the store, statuses and news to the owner. What cannot
// be stored is not read on, so that back-pressure reaches the agent; nothing piles up here.
class SpoolFollower {
 public:
  struct Callbacks {  // on the reader's thread; must not block
    std::function<void(std::vector<agent::v1::AttemptStatus>)> on_statuses;
    std::function<void(const AttemptKey&)> on_drained;  // what Drained() was asked for is stored now
    // About lines that could not be read: once per attempt, of the first chunk with any.
    std::function<void(const AttemptKey&, std::string complaint, int64_t lines)> on_complaint;
    std::function<void(absl::Status)> on_end;  // once, at the end of the stream
  };

  SpoolFollower(std::unique_ptr<FollowStream> stream, JobStore* store, Clock* clock, Callbacks callbacks);
  ~SpoolFollower();  // stops

  // Begins to follow from the stored cursor; again after a Drop, or when it is not followed yet. False: stream gone.
  bool Add(const AttemptKey& attempt, const agent::v1::SpoolCursor& cursor);
  void Drop(const AttemptKey& attempt);
  // All of the attempt up to `sizes` is stored; if not, on_drained will say when.
  bool Drained(const AttemptKey& attempt, const agent::v1::SpoolSizes& sizes);
  // Idempotent; joins the reader.
  void Stop();

 private:
  struct Followed {
    agent::v1::SpoolCursor cursor;
    std::optional<agent::v1::SpoolSizes> awaited;
    SeriesNames names;        // reader's thread only
    bool complained = false;  // reader's thread only
  };

  void Run();
  // False: stopped.
  bool Store(const agent::v1::FollowResponse& response);
  absl::StatusOr<std::vector<SpoolCommit>> Commit(const std::vector<SpoolBatch>& batches);
  void AddAgain(const AttemptKey& attempt, const agent::v1::SpoolCursor& cursor);

  const std::unique_ptr<FollowStream> stream_;
  JobStore* const store_;
  Clock* const clock_;
  const Callbacks callbacks_;
  SpoolParser parser_;  // reader's thread

  mutable absl::Mutex mu_;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  absl::flat_hash_map<AttemptKey, std::shared_ptr<Followed>> followed_ ABSL_GUARDED_BY(mu_);

  absl::Mutex join_mu_;
  std::thread reader_;  // last
};

}  // namespace itwin::server

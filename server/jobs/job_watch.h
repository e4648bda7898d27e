#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "itwin/v1/jobs.pb.h"
#include "server/jobs/event_hub.h"
#include "server/store/job_store.h"

namespace itwin::server {

// One watcher of one job: a place in its history, moved on by reading the store. Nothing is repeated or skipped, and
// a watch made with the cursor of an update goes on behind it. One thread at a time.
class JobWatch {
 public:
  struct Options {
    JobId job;
    v1::WatchCursor cursor;  // empty: from the start
    bool points = false;
    bool logs = false;
  };
  struct Step {
    // A v1::JobUpdate as it goes over the wire, shared by the watchers at the same place. Null: nothing new; `wake` will be
    // called.
    std::shared_ptr<const std::string> update;
    bool finished = false;                        // the job is final and this was the last
  };

  // Store and hub must outlive the watch. `wake` as in EventHub::Subscribe; errors as there, and kInvalidArgument for a
  // cursor with negative numbers.
  static absl::StatusOr<std::unique_ptr<JobWatch>> Open(JobStore* store, EventHub* hub, const Options& options,
                                                        EventHub::Wake wake);
  // What is new, in portions: reads the store, so it may wait for the disk. kUnavailable: the gateway stops; go on later
  // with the last cursor.
  absl::StatusOr<Step> Next();
  // Whether Next would find nothing new, as far as is known without reading. True: `wake` will be called. False, too, once the
  // gateway stops.
  bool Rests() { return !hub_.closed() && !more_ && subscription_->Rest(seen_); }

 private:
  JobWatch(JobStore* store, EventHub* hub, const Options& options, std::unique_ptr<EventHub::Subscription> subscription)
      : store_(*store), hub_(*hub), options_(options), subscription_(std::move(subscription)) {}
  absl::StatusOr<WatchTopic::Shared> Read(const WatchTopic::Shared& key);
  absl::Status ReadLogs(const JobRow& row, v1::JobUpdate* update, bool* more);

  JobStore& store_;
  EventHub& hub_;
  Options options_;  // the cursor moves
  const std::unique_ptr<EventHub::Subscription> subscription_;
  ChangeCounts seen_;
  bool more_ = true;        // read, even if nothing has changed
  uint64_t job_seen_ = 0;   // count of the job's changes at the last time it was sent, plus one; 0: never
};

}  // namespace itwin::server

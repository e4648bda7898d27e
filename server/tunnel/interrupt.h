#pragma once

#include <poll.h>

#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/files.h"

namespace itwin::server {

// Ends what one thread waits for, from any other. Thread-safe.
class Interrupt {
 public:
  static absl::StatusOr<std::shared_ptr<Interrupt>> Create();

  // Every wait ends at once, now and later.
  void Set();
  bool is_set() const;

  // poll() until something is ready (OK; look at revents), the deadline (kDeadlineExceeded) or the interrupt (kCancelled).
  absl::Status Poll(std::vector<pollfd>* entries, absl::Time deadline) const;
  static absl::Status Cancelled();

  // A socket that somebody else's code may wait on without us: Set shuts it down. One at a time; -1: none.
  void Guard(int fd);

 private:
  explicit Interrupt(FileDescriptor event) : event_(std::move(event)) {}
  const FileDescriptor event_;  // readable once set
  mutable absl::Mutex mu_;
  bool set_ ABSL_GUARDED_BY(mu_) = false;
  FileDescriptor guarded_ ABSL_GUARDED_BY(mu_);
};

}  // namespace itwin::server

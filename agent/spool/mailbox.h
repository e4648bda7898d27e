#pragma once

#include <functional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/files.h"

namespace itwin::agent {

// How other threads reach a loop: they post closures, the loop's thread runs them in order. The only lock in
// the agent. Thread-safe.
class Mailbox {
 public:
  Mailbox();

  // After Close() the closure is dropped and false is returned.
  bool Post(std::function<void()> task);
  // The loop's thread: runs what was posted before the call; returns how many.
  int RunPosted();
  void Close();

  // Readable while something is posted; for the loop's poll().
  int fd() const { return event_.get(); }

 private:
  FileDescriptor event_;
  absl::Mutex mu_;
  std::vector<std::function<void()>> tasks_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace itwin::agent

#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace itwin::agent {

// Threads for what may take its time (a slow file system, a scheduler that does not answer), so that no loop waits.
// Thread-safe. Tasks report back by posting to a loop's mailbox.
class WorkPool {
 public:
  explicit WorkPool(int threads);
  ~WorkPool();  // Stop()

  void Run(std::function<void()> task);  // dropped after Stop()
  // Waits for what is under way; what has not begun is dropped. Idempotent.
  void Stop();

 private:
  void Work();

  absl::Mutex mu_;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace itwin::agent

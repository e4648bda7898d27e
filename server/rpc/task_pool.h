#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace itwin::server {

// A few threads for what reactors must not do on gRPC's own: reading the store, reading and writing files. First come,
// first served. Whoever posts keeps itself to one task at a time, which bounds the queue.
class TaskPool {
 public:
  explicit TaskPool(int threads);
  ~TaskPool();  // runs what waits
  void Post(std::function<void()> task) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || !tasks_.empty(); }
  void Loop();

  absl::Mutex mu_;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace itwin::server

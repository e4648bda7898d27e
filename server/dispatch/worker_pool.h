#pragma once

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace itwin::server {

// Runs tasks away from a loop. The loop bounds what it hands over: one task per job and kind.
class Executor {
 public:
  virtual ~Executor() = default;
  // Thread-safe. After Stop the task is dropped.
  virtual void Submit(std::function<void()> task) = 0;
  // Drops what has not begun and waits for what has. Idempotent.
  virtual void Stop() = 0;
};

class WorkerPool : public Executor {
 public:
  explicit WorkerPool(int threads);
  ~WorkerPool() override { Stop(); }
  void Submit(std::function<void()> task) override;
  void Stop() override;

 private:
  void Run();
  bool HasWork() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stopped_ || !tasks_.empty(); }

  absl::Mutex mu_;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mu_);
  absl::Mutex join_mu_;
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(join_mu_);
};

}  // namespace itwin::server

// A thread that does one piece of work after the other, in the order in which they were started: what
// blocks, such as a collective of MPI, goes on beside the computing.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

class WorkThread {
 public:
  WorkThread();
  ~WorkThread();  // does what was started
  WorkThread(const WorkThread&) = delete;

  // Its Wait() blocks until the work is done, and throws what it threw. It must be gone before this.
  std::unique_ptr<Work> Start(std::function<void()> work);

 private:
  struct State {
    std::function<void()> work;
    bool done = false;
    std::exception_ptr error;
  };
  class Queued;
  void Run();

  std::mutex mutex_;
  std::condition_variable started_, finished_;
  std::deque<std::shared_ptr<State>> queue_;  // bounded by the caller: it waits for a step's buckets
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace itwin::worker

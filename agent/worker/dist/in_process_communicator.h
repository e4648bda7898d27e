// Ranks as threads of one process, so that tests can run the real training loop on several ranks.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// What the ranks of one communicator share. Must outlive them.
class InProcessGroup {
 public:
  explicit InProcessGroup(int size) : size_(size), buffers_(size), all_(size) {}

  int size() const { return size_; }

  // Every rank calls it; the last to arrive runs `combine` over all ranks' buffers, then all go on.
  // Throws AppError in every rank once Fail() was called.
  void Meet(
      int rank, Buffer mine, Buffer all,
      const std::function<void(std::vector<Buffer>& mine, std::vector<Buffer>& all)>& combine);

  // A rank that cannot go on lets the others out of Meet().
  void Fail();

 private:
  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Buffer> buffers_, all_;
  int arrived_ = 0;
  int64_t generation_ = 0;
  bool failed_ = false;
};

// A collective blocks in the call that starts it; Wait() is free.
class InProcessCommunicator : public Communicator {
 public:
  InProcessCommunicator(InProcessGroup& group, int rank) : group_(group), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_.size(); }
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override;
  std::unique_ptr<Work> Broadcast(Buffer buffer, int root) override;
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override;
  std::unique_ptr<Work> Barrier() override;

 private:
  InProcessGroup& group_;
  const int rank_;
};

}  // namespace itwin::worker

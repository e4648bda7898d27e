// Ranks as threads of one process, so that tests can run the real training loop on several ranks.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// What the ranks of one communicator share. Must outlive them.
class InProcessGroup {
 public:
  explicit InProcessGroup(int size)
      : size_(size), buffers_(static_cast<size_t>(size)), all_(static_cast<size_t>(size)) {}

  int size() const { return size_; }

  // Every rank calls it; the last to arrive runs `combine` over all ranks' buffers, then all go on.
  // Throws AppError in every rank once Fail() was called.
  void Meet(
      int rank, Buffer mine, Buffer all,
      const std::function<void(std::vector<Buffer>& mine, std::vector<Buffer>& all)>& combine);

  // A message waits in the group until it is taken; Take waits for it and throws like Meet.
  void Put(int from, int to, Buffer buffer);
  void Take(int from, int to, Buffer buffer);

  // A group of some of the ranks; it fails with this one.
  std::shared_ptr<InProcessGroup> MakePart(int size);

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
  std::map<std::pair<int, int>, std::deque<std::vector<char>>> messages_;  // (from, to)
  std::vector<std::weak_ptr<InProcessGroup>> parts_;
};

// A collective blocks in the call that starts it; Wait() is free.
class InProcessCommunicator : public Communicator {
 public:
  InProcessCommunicator(InProcessGroup& group, int rank) : group_(group), rank_(rank) {}
  InProcessCommunicator(std::shared_ptr<InProcessGroup> group, int rank)
      : owned_(std::move(group)), group_(*owned_), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_.size(); }
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override;
  std::unique_ptr<Work> Broadcast(Buffer buffer, int root) override;
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override;
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override;
  std::unique_ptr<Work> Barrier() override;
  std::unique_ptr<Work> Send(Buffer buffer, int to) override;
  std::unique_ptr<Work> Recv(Buffer buffer, int from) override;  // blocks in Wait
  std::unique_ptr<Communicator> Split(int color, int key) override;

 private:
  const std::shared_ptr<InProcessGroup> owned_;  // of a part
  InProcessGroup& group_;
  const int rank_;
};

}  // namespace itwin::worker

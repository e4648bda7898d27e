// The communicator of a job with one rank: every collective is the identity.
#pragma once

#include <deque>
#include <vector>

#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

class SelfCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override;
  std::unique_ptr<Work> Broadcast(Buffer buffer, int root) override;
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override;
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override;
  std::unique_ptr<Work> Barrier() override;
  // To oneself.
  std::unique_ptr<Work> Send(Buffer buffer, int to) override;
  std::unique_ptr<Work> Recv(Buffer buffer, int from) override;
  std::unique_ptr<Communicator> Split(int color, int key) override;

 private:
  std::deque<std::vector<char>> sent_;
};

}  // namespace itwin::worker

// Hands everything on; decorators override what they change.
#pragma once

#include <memory>

#include "agent/worker/dist/communicator.h"

namespace itwin::worker::testing {

class ForwardingCommunicator : public Communicator {
 public:
  explicit ForwardingCommunicator(Communicator& inner) : inner_(inner) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override {
    return inner_.AllReduce(buffer, reduction);
  }
  std::unique_ptr<Work> Broadcast(Buffer buffer, int root) override {
    return inner_.Broadcast(buffer, root);
  }
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override {
    return inner_.AllGather(mine, all);
  }
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override {
    return inner_.ReduceScatter(all, mine, reduction);
  }
  std::unique_ptr<Work> Barrier() override { return inner_.Barrier(); }
  std::unique_ptr<Work> Send(Buffer buffer, int to) override { return inner_.Send(buffer, to); }
  std::unique_ptr<Work> Recv(Buffer buffer, int from) override { return inner_.Recv(buffer, from); }
  std::unique_ptr<Communicator> Split(int color, int key) override {
    return inner_.Split(color, key);
  }

 protected:
  Communicator& inner_;
};

}  // namespace itwin::worker::testing

// Ranks with a device each whose buffers travel through host memory: for GPUs where NCCL cannot be
// used. A buffer is copied to pinned memory on a stream beside the computing, a thread runs the
// collective there when the bytes have arrived, and copies back. Slower than NCCL, and the same numbers
// as the communicator that it is made with.
#pragma once

#include <memory>
#include <vector>

#include "agent/worker/device/streams.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/dist/work_thread.h"

namespace itwin::worker {

class StagedCommunicator : public Communicator {
 public:
  // `host` becomes this one's, and its thread's: host buffers go through it, too, in their order.
  StagedCommunicator(std::unique_ptr<Communicator> host, at::Device device);

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override;
  std::unique_ptr<Work> Broadcast(Buffer buffer, int root) override;
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override;
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override;
  std::unique_ptr<Work> Barrier() override;
  std::unique_ptr<Work> Send(Buffer buffer, int to) override;
  std::unique_ptr<Work> Recv(Buffer buffer, int from) override;
  std::unique_ptr<Communicator> Split(int color, int key) override;

 private:
  struct StandIn;
  class Operation;
  class Message;
  using Call = std::function<std::unique_ptr<Work>(const std::vector<Buffer>& host)>;

  // A buffer that is read, that is written, or both.
  struct Use {
    Buffer buffer;
    bool read = false, written = false;
  };
  std::unique_ptr<Work> Start(const std::vector<Use>& uses, Call call);
  // Of a buffer, with its content where it is read; on the stream of copies to the host.
  StandIn MakeStandIn(const Use& use);

  const std::unique_ptr<Communicator> host_;
  const at::Device device_;
  const c10::Stream compute_, to_host_, to_device_;
  WorkThread thread_;  // last: its work uses all of the above
};

}  // namespace itwin::worker

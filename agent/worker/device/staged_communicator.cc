#include "agent/worker/device/staged_communicator.h"

#include <utility>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

namespace itwin::worker {

// What stands for a buffer in host memory; the buffer itself, where it is there already.
struct StagedCommunicator::StandIn {
  Buffer buffer;
  at::Tensor on_device{}, on_host{};
};

class StagedCommunicator::Operation : public Work {
 public:
  // Of the stream of copies back, once the thread has been there.
  using Mark = std::shared_ptr<std::optional<StreamMark>>;
  Operation(std::unique_ptr<Work> work, Mark mark, const c10::Stream& compute)
      : work_(std::move(work)), mark_(std::move(mark)), compute_(compute) {}
  void Wait() override {
    work_->Wait();
    (*mark_)->HoldBack(compute_);
  }

 private:
  const std::unique_ptr<Work> work_;
  const Mark mark_;
  const c10::Stream compute_;
};

// Between two ranks.
class StagedCommunicator::Message : public Work {
 public:
  Message(StandIn stand_in, bool received, std::unique_ptr<Work> work, const StagedCommunicator& owner)
      : stand_in_(std::move(stand_in)), received_(received), work_(std::move(work)), owner_(owner) {}
  void Wait() override {
    work_->Wait();
    if (!received_) return;
    StreamMark(owner_.compute_).HoldBack(owner_.to_device_);  // which may still use that memory
    {
      const StreamScope scope(owner_.to_device_);
      stand_in_.on_device.copy_(stand_in_.on_host, /*non_blocking=*/true);
    }
    StreamMark(owner_.to_device_).HoldBack(owner_.compute_);
  }

 private:
  StandIn stand_in_;
  const bool received_;
  const std::unique_ptr<Work> work_;
  const StagedCommunicator& owner_;
};

StagedCommunicator::StagedCommunicator(std::unique_ptr<Communicator> host, at::Device device)
    : host_(std::move(host)),
      device_(device),
      compute_(CurrentStream(device)),
      to_host_(StreamBeside(device)),
      to_device_(StreamBeside(device)) {}

StagedCommunicator::StandIn StagedCommunicator::MakeStandIn(const Use& use) {
  StandIn s{.buffer = use.buffer};
  if (!use.buffer.on_device) return s;
  const std::vector<int64_t> bytes = {SizeInBytes(use.buffer)};
  const auto options = at::TensorOptions().dtype(at::kByte);
  s.on_device =
      at::for_blob(use.buffer.data, bytes).target_device(device_).options(options.device(device_)).make_tensor();
  s.on_host = at::empty(bytes, options.pinned_memory(WantsPinnedMemory(device_)));
  s.buffer = {s.on_host.data_ptr(), use.buffer.count, use.buffer.type};
  if (use.read) s.on_host.copy_(s.on_device, /*non_blocking=*/true);
  return s;
}

std::unique_ptr<Work> StagedCommunicator::Start(const std::vector<Use>& uses, Call call) {
  StreamMark(compute_).HoldBack(to_host_);
  auto stand_ins = std::make_shared<std::vector<StandIn>>();
  {
    const StreamScope scope(to_host_);
    for (const Use& use : uses) stand_ins->push_back(MakeStandIn(use));
  }
  auto arrived = std::make_shared<StreamMark>(to_host_);
  auto returned = std::make_shared<std::optional<StreamMark>>();
  auto work = thread_.Start([this, uses, stand_ins, arrived, returned, call = std::move(call)] {
    arrived->Wait();
    std::vector<Buffer> buffers;
    for (const StandIn& s : *stand_ins) buffers.push_back(s.buffer);
    call(buffers)->Wait();
    const StreamScope scope(to_device_);
    for (size_t i = 0; i < uses.size(); ++i) {
      StandIn& s = (*stand_ins)[i];
      if (uses[i].written && s.on_host.defined()) s.on_device.copy_(s.on_host, /*non_blocking=*/true);
    }
    returned->emplace(to_device_);
  });
  return std::make_unique<Operation>(std::move(work), std::move(returned), compute_);
}

std::unique_ptr<Work> StagedCommunicator::AllReduce(Buffer buffer, Reduction reduction) {
  return Start({{buffer, true, true}}, [this, reduction](const std::vector<Buffer>& host) {
    return host_->AllReduce(host[0], reduction);
  });
}
std::unique_ptr<Work> StagedCommunicator::Broadcast(Buffer buffer, int root) {
  return Start({{buffer, rank() == root, rank() != root}},
               [this, root](const std::vector<Buffer>& host) {
                 return host_->Broadcast(host[0], root);
               });
}
std::unique_ptr<Work> StagedCommunicator::AllGather(Buffer mine, Buffer all) {
  return Start({{mine, true, false}, {all, false, true}}, [this](const std::vector<Buffer>& host) {
    return host_->AllGather(host[0], host[1]);
  });
}
std::unique_ptr<Work> StagedCommunicator::ReduceScatter(Buffer all, Buffer mine,
                                                        Reduction reduction) {
  return Start({{all, true, false}, {mine, false, true}},
               [this, reduction](const std::vector<Buffer>& host) {
                 return host_->ReduceScatter(host[0], host[1], reduction);
               });
}
std::unique_ptr<Work> StagedCommunicator::Barrier() {
  return Start({}, [this](const std::vector<Buffer>&) { return host_->Barrier(); });
}
std::unique_ptr<Work> StagedCommunicator::Send(Buffer buffer, int to) {
  // At once, whatever collectives are queued: the other rank may wait for it.
  if (!buffer.on_device) return host_->Send(buffer, to);
  StreamMark(compute_).HoldBack(to_host_);
  const StreamScope scope(to_host_);
  StandIn s = MakeStandIn({buffer, /*read=*/true, /*written=*/false});
  StreamMark(to_host_).Wait();
  auto work = host_->Send(s.buffer, to);
  return std::make_unique<Message>(std::move(s), /*received=*/false, std::move(work), *this);
}
std::unique_ptr<Work> StagedCommunicator::Recv(Buffer buffer, int from) {
  if (!buffer.on_device) return host_->Recv(buffer, from);
  StandIn s = MakeStandIn({buffer, /*read=*/false, /*written=*/true});
  auto work = host_->Recv(s.buffer, from);
  return std::make_unique<Message>(std::move(s), /*received=*/true, std::move(work), *this);
}

std::unique_ptr<Communicator> StagedCommunicator::Split(int color, int key) {
  std::unique_ptr<Communicator> part;
  thread_.Start([&] { part = host_->Split(color, key); })->Wait();
  return std::make_unique<StagedCommunicator>(std::move(part), device_);
}

}  // namespace itwin::worker

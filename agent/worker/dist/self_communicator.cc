#include "agent/worker/dist/self_communicator.h"

#include <cstring>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {
class Done : public Work {
 public:
  void Wait() override {}
};
void Copy(const Buffer& to, const Buffer& from) {
  if (from.count > 0 && to.data != from.data)
    std::memcpy(to.data, from.data, static_cast<size_t>(SizeInBytes(from)));
}
}  // namespace

std::unique_ptr<Work> SelfCommunicator::AllReduce(Buffer, Reduction) {
  return std::make_unique<Done>();
}
std::unique_ptr<Work> SelfCommunicator::Broadcast(Buffer, int) { return std::make_unique<Done>(); }
std::unique_ptr<Work> SelfCommunicator::AllGather(Buffer mine, Buffer all) {
  Copy(all, mine);
  return std::make_unique<Done>();
}
std::unique_ptr<Work> SelfCommunicator::ReduceScatter(Buffer all, Buffer mine, Reduction) {
  Copy(mine, all);
  return std::make_unique<Done>();
}
std::unique_ptr<Work> SelfCommunicator::Barrier() { return std::make_unique<Done>(); }

std::unique_ptr<Work> SelfCommunicator::Send(Buffer buffer, int) {
  const char* bytes = static_cast<const char*>(buffer.data);
  sent_.emplace_back(bytes, bytes + SizeInBytes(buffer));
  return std::make_unique<Done>();
}
std::unique_ptr<Work> SelfCommunicator::Recv(Buffer buffer, int) {
  if (sent_.empty()) throw AppError("a rank waits for a message of its own that it has not sent");
  if (static_cast<int64_t>(sent_.front().size()) != SizeInBytes(buffer)) {
    throw AppError("a message has another length than its receiver expects");
  }
  Copy(buffer, {sent_.front().data(), static_cast<int64_t>(sent_.front().size())});
  sent_.pop_front();
  return std::make_unique<Done>();
}

std::unique_ptr<Communicator> SelfCommunicator::Split(int, int) {
  return std::make_unique<SelfCommunicator>();
}

}  // namespace itwin::worker

#include "agent/worker/dist/in_process_communicator.h"

#include <algorithm>
#include <cstring>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

class Done : public Work {
 public:
  void Wait() override {}
};

template <typename T>
void Reduce(std::vector<Buffer>& buffers, Reduction reduction) {
  const int64_t count = buffers[0].count;
  T* first = static_cast<T*>(buffers[0].data);
  for (size_t r = 1; r < buffers.size(); ++r) {  // rank order, so that runs repeat bit for bit
    const T* other = static_cast<const T*>(buffers[r].data);
    for (int64_t i = 0; i < count; ++i) {
      first[i] = reduction == Reduction::kSum ? first[i] + other[i] : std::max(first[i], other[i]);
    }
  }
  for (size_t r = 1; r < buffers.size(); ++r) {
    std::copy(first, first + count, static_cast<T*>(buffers[r].data));
  }
}

}  // namespace

void InProcessGroup::Meet(
    int rank, Buffer mine, Buffer all,
    const std::function<void(std::vector<Buffer>& mine, std::vector<Buffer>& all)>& combine) {
  std::unique_lock lock(mutex_);
  if (failed_) throw AppError("another rank failed");
  buffers_[rank] = mine;
  all_[rank] = all;
  const int64_t generation = generation_;
  if (++arrived_ == size_) {
    for (const Buffer& b : buffers_) {
      if (b.count != mine.count || b.type != mine.type) {
        failed_ = true;
        changed_.notify_all();
        throw AppError("ranks called different collectives");
      }
    }
    combine(buffers_, all_);
    arrived_ = 0;
    ++generation_;
    changed_.notify_all();
    return;
  }
  changed_.wait(lock, [&] { return generation_ != generation || failed_; });
  if (generation_ == generation) throw AppError("another rank failed");
}

void InProcessGroup::Fail() {
  std::lock_guard lock(mutex_);
  failed_ = true;
  changed_.notify_all();
}

std::unique_ptr<Work> InProcessCommunicator::AllReduce(Buffer buffer, Reduction reduction) {
  group_.Meet(rank_, buffer, {}, [&](std::vector<Buffer>& buffers, std::vector<Buffer>&) {
    switch (buffer.type) {
      case ElementType::kFloat32:
        return Reduce<float>(buffers, reduction);
      case ElementType::kFloat64:
        return Reduce<double>(buffers, reduction);
      case ElementType::kInt64:
        return Reduce<int64_t>(buffers, reduction);
      case ElementType::kByte:
        throw AppError("bytes cannot be reduced");
    }
  });
  return std::make_unique<Done>();
}

std::unique_ptr<Work> InProcessCommunicator::Broadcast(Buffer buffer, int root) {
  group_.Meet(rank_, buffer, {}, [&](std::vector<Buffer>& buffers, std::vector<Buffer>&) {
    for (const Buffer& b : buffers) {
      if (b.data != buffers[root].data) std::memcpy(b.data, buffers[root].data, SizeInBytes(b));
    }
  });
  return std::make_unique<Done>();
}

std::unique_ptr<Work> InProcessCommunicator::AllGather(Buffer mine, Buffer all) {
  group_.Meet(rank_, mine, all, [](std::vector<Buffer>& buffers, std::vector<Buffer>& alls) {
    for (const Buffer& to : alls) {
      char* at = static_cast<char*>(to.data);
      for (const Buffer& from : buffers) {
        std::memcpy(at, from.data, SizeInBytes(from));
        at += SizeInBytes(from);
      }
    }
  });
  return std::make_unique<Done>();
}

std::unique_ptr<Work> InProcessCommunicator::Barrier() {
  group_.Meet(rank_, {}, {}, [](std::vector<Buffer>&, std::vector<Buffer>&) {});
  return std::make_unique<Done>();
}

}  // namespace itwin::worker

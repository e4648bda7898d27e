#include "agent/worker/dist/in_process_communicator.h"

#include <algorithm>
#include <cstring>

#include "agent/worker/dist/half.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

class Done : public Work {
 public:
  void Wait() override {}
};

template <typename T>
T Combine(T a, T b, Reduction reduction) {
  return reduction == Reduction::kSum ? a + b : std::max(a, b);
}

// Elements [first, first + count) of all ranks' buffers, in rank order, so that runs repeat bit for
// bit.
template <typename T>
void ReduceInto(T* to, const std::vector<Buffer>& from, int64_t first, int64_t count,
                Reduction reduction) {
  for (int64_t i = 0; i < count; ++i) {
    T value = static_cast<const T*>(from[0].data)[first + i];
    for (size_t r = 1; r < from.size(); ++r)
      value = Combine(value, static_cast<const T*>(from[r].data)[first + i], reduction);
    to[i] = value;
  }
}

void ReduceHalfInto(uint16_t* to, const std::vector<Buffer>& from, int64_t first, int64_t count,
                    Reduction reduction, bool brain) {
  const auto read = [&](size_t r, int64_t i) {
    const uint16_t bits = static_cast<const uint16_t*>(from[r].data)[i];
    return brain ? FromBfloat16(bits) : FromFloat16(bits);
  };
  for (int64_t i = 0; i < count; ++i) {
    float value = read(0, first + i);
    for (size_t r = 1; r < from.size(); ++r) value = Combine(value, read(r, first + i), reduction);
    to[i] = brain ? ToBfloat16(value) : ToFloat16(value);
  }
}

// Into `to`, which overlaps none of `from`.
void Reduce(const Buffer& to, const std::vector<Buffer>& from, int64_t first, Reduction reduction) {
  switch (to.type) {
    case ElementType::kFloat32:
      return ReduceInto(static_cast<float*>(to.data), from, first, to.count, reduction);
    case ElementType::kFloat64:
      return ReduceInto(static_cast<double*>(to.data), from, first, to.count, reduction);
    case ElementType::kInt64:
      return ReduceInto(static_cast<int64_t*>(to.data), from, first, to.count, reduction);
    case ElementType::kFloat16:
      return ReduceHalfInto(static_cast<uint16_t*>(to.data), from, first, to.count, reduction,
                            /*brain=*/false);
    case ElementType::kBfloat16:
      return ReduceHalfInto(static_cast<uint16_t*>(to.data), from, first, to.count, reduction,
                            /*brain=*/true);
    case ElementType::kByte:
      throw AppError("bytes cannot be reduced");
  }
}

class Later : public Work {
 public:
  explicit Later(std::function<void()> wait) : wait_(std::move(wait)) {}
  void Wait() override { wait_(); }

 private:
  const std::function<void()> wait_;
};

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
    try {
      combine(buffers_, all_);
    } catch (...) {
      failed_ = true;
      changed_.notify_all();
      throw;
    }
    arrived_ = 0;
    ++generation_;
    changed_.notify_all();
    return;
  }
  changed_.wait(lock, [&] { return generation_ != generation || failed_; });
  if (generation_ == generation) throw AppError("another rank failed");
}

void InProcessGroup::Put(int from, int to, Buffer buffer) {
  const char* bytes = static_cast<const char*>(buffer.data);
  std::lock_guard lock(mutex_);
  messages_[{from, to}].emplace_back(bytes, bytes + SizeInBytes(buffer));
  changed_.notify_all();
}

void InProcessGroup::Take(int from, int to, Buffer buffer) {
  std::unique_lock lock(mutex_);
  auto& queue = messages_[{from, to}];
  changed_.wait(lock, [&] { return !queue.empty() || failed_; });
  if (queue.empty()) throw AppError("another rank failed");
  if (static_cast<int64_t>(queue.front().size()) != SizeInBytes(buffer)) {
    throw AppError("a message has another length than its receiver expects");
  }
  std::copy(queue.front().begin(), queue.front().end(), static_cast<char*>(buffer.data));
  queue.pop_front();
}

// Called in Meet, under its lock.
std::shared_ptr<InProcessGroup> InProcessGroup::MakePart(int size) {
  auto part = std::make_shared<InProcessGroup>(size);
  parts_.push_back(part);
  return part;
}

void InProcessGroup::Fail() {
  std::vector<std::weak_ptr<InProcessGroup>> parts;
  {
    std::lock_guard lock(mutex_);
    failed_ = true;
    parts = parts_;
    changed_.notify_all();
  }
  for (const auto& part : parts) {
    if (const auto alive = part.lock()) alive->Fail();
  }
}

std::unique_ptr<Work> InProcessCommunicator::AllReduce(Buffer buffer, Reduction reduction) {
  group_.Meet(rank_, buffer, {}, [&](std::vector<Buffer>& buffers, std::vector<Buffer>&) {
    std::vector<char> sum(static_cast<size_t>(SizeInBytes(buffer)));
    Reduce({sum.data(), buffer.count, buffer.type}, buffers, 0, reduction);
    for (const Buffer& b : buffers) std::copy(sum.begin(), sum.end(), static_cast<char*>(b.data));
  });
  return std::make_unique<Done>();
}

std::unique_ptr<Work> InProcessCommunicator::ReduceScatter(Buffer all, Buffer mine,
                                                           Reduction reduction) {
  group_.Meet(rank_, mine, all, [&](std::vector<Buffer>& to, std::vector<Buffer>& from) {
    for (size_t r = 0; r < to.size(); ++r)
      Reduce(to[r], from, static_cast<int64_t>(r) * to[r].count, reduction);
  });
  return std::make_unique<Done>();
}

std::unique_ptr<Work> InProcessCommunicator::Send(Buffer buffer, int to) {
  group_.Put(rank_, to, buffer);
  return std::make_unique<Done>();
}

std::unique_ptr<Work> InProcessCommunicator::Recv(Buffer buffer, int from) {
  return std::make_unique<Later>([=, this] { group_.Take(from, rank_, buffer); });
}

std::unique_ptr<Communicator> InProcessCommunicator::Split(int color, int key) {
  struct Place {
    int color, key, rank;
    std::shared_ptr<InProcessGroup> group;
    int new_rank = 0;
  } place{color, key, rank_, nullptr};
  group_.Meet(rank_, {&place, 1}, {}, [&](std::vector<Buffer>& buffers, std::vector<Buffer>&) {
    std::map<int, std::vector<Place*>> by_color;
    for (const Buffer& b : buffers) {
      auto* p = static_cast<Place*>(b.data);
      by_color[p->color].push_back(p);
    }
    for (auto& [c, places] : by_color) {
      std::stable_sort(places.begin(), places.end(),
                       [](const Place* a, const Place* b) { return a->key < b->key; });
      const auto part = group_.MakePart(static_cast<int>(places.size()));
      for (size_t i = 0; i < places.size(); ++i) {
        places[i]->group = part;
        places[i]->new_rank = static_cast<int>(i);
      }
    }
  });
  return std::make_unique<InProcessCommunicator>(std::move(place.group), place.new_rank);
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
        if (at != from.data) std::memcpy(at, from.data, static_cast<size_t>(SizeInBytes(from)));
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

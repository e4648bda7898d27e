#include "agent/worker/training/horovod.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

template <typename T>
void AdasumOf(std::span<T*> ranks, int64_t count) {
  for (size_t step = 1; step < ranks.size(); step *= 2) {
    for (size_t r = 0; r + step < ranks.size(); r += 2 * step) {
      T* a = ranks[r];
      const T* b = ranks[r + step];
      double aa = 0, bb = 0, ab = 0;
      for (int64_t i = 0; i < count; ++i) {
        aa += static_cast<double>(a[i]) * static_cast<double>(a[i]);
        bb += static_cast<double>(b[i]) * static_cast<double>(b[i]);
        ab += static_cast<double>(a[i]) * static_cast<double>(b[i]);
      }
      const T of_a = static_cast<T>(aa > 0 ? 1 - ab / (2 * aa) : 1);
      const T of_b = static_cast<T>(bb > 0 ? 1 - ab / (2 * bb) : 1);
      for (int64_t i = 0; i < count; ++i) a[i] = of_a * a[i] + of_b * b[i];
    }
  }
}

}  // namespace

void Adasum(std::span<float*> ranks, int64_t count) { AdasumOf(ranks, count); }
void Adasum(std::span<double*> ranks, int64_t count) { AdasumOf(ranks, count); }

Horovod::Horovod(FlatParameters& parameters, Communicator& communicator, Options options)
    : parameters_(parameters),
      communicator_(communicator),
      options_(options),
      ranges_(WholeBuckets(parameters)),
      used_(parameters.parameters().size(), 0),
      states_(parameters.parameters().size(), State::kComing),
      missing_(parameters.buckets().size(), 0),
      hooks_(parameters, [this](size_t i) {
        used_[i] = 1;
        if (!last_) return;
        std::lock_guard lock(mutex_);
        states_[i] = State::kReady;
      }) {
  for (const FlatRange& range : ranges_)
    communicator_.Broadcast(BufferOfTensor(range.values), 0)->Wait();
  thread_ = std::thread([this] { Run(); });
}

Horovod::~Horovod() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Horovod::BeginBackward(const StepStatus& status, bool last) {
  last_ = last;
  if (!last) return;
  std::lock_guard lock(mutex_);
  std::fill(states_.begin(), states_.end(), State::kComing);
  for (size_t b = 0; b < missing_.size(); ++b)
    missing_[b] = static_cast<int64_t>(parameters_.buckets()[b].parameters.size());
  status_ = {status.loss, status.not_finite, status.stop};
  complete_ = false;
  active_ = true;
  changed_.notify_all();
}

void Horovod::EndBackward() {
  if (!last_) return;
  std::lock_guard lock(mutex_);
  complete_ = true;
  // What backward did not reach is zero here; other ranks may have more.
  for (State& state : states_) {
    if (state == State::kComing) state = State::kReady;
  }
  changed_.notify_all();
}

void Horovod::WaitGradients(size_t range) {
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return missing_[range] == 0 || error_; });
  if (error_) std::rethrow_exception(error_);
  waited_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

StepStatus Horovod::EndStep(bool* agreed) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !active_ || error_; });
  if (error_) std::rethrow_exception(error_);
  *agreed = true;
  return {.loss = status_[0], .not_finite = status_[1], .stop = status_[2]};
}

void Horovod::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || active_; });
    if (stopping_) return;
    // A cycle: let gradients gather, unless there are no more to come.
    changed_.wait_for(lock, std::chrono::duration<double>(options_.cycle_seconds),
                      [&] { return stopping_ || complete_; });
    if (stopping_) return;
    lock.unlock();
    try {
      Cycle();
    } catch (...) {
      lock.lock();
      error_ = std::current_exception();
      active_ = false;
      changed_.notify_all();
      return;
    }
    lock.lock();
  }
}

void Horovod::Cycle() {
  // Which gradients are ready on every rank: their count is the number of ranks.
  std::vector<int64_t> ready(states_.size());
  {
    std::lock_guard lock(mutex_);
    for (size_t i = 0; i < ready.size(); ++i) ready[i] = states_[i] == State::kReady ? 1 : 0;
  }
  communicator_.AllReduce(BufferOf(std::span(ready)), Reduction::kSum)->Wait();
  std::vector<size_t> batch;
  int64_t bytes = 0;
  bool any = false;
  const auto flush = [&] {
    if (!batch.empty()) Reduce(batch);
    batch.clear();
    bytes = 0;
  };
  for (size_t i = 0; i < ready.size(); ++i) {
    if (ready[i] != communicator_.size()) continue;
    const at::Tensor& tensor = parameters_.parameters()[i].tensor;
    const auto size = static_cast<int64_t>(tensor.nbytes());
    const bool other_type =
        !batch.empty() &&
        parameters_.parameters()[batch[0]].tensor.scalar_type() != tensor.scalar_type();
    if (other_type || (bytes + size > options_.fusion_bytes && !batch.empty())) flush();
    batch.push_back(i);
    bytes += size;
    any = true;
  }
  flush();
  if (!any) return;
  bool done = false;
  {
    std::lock_guard lock(mutex_);
    done = std::all_of(missing_.begin(), missing_.end(), [](int64_t n) { return n == 0; });
  }
  if (!done) return;
  std::array<double, 3> status = status_;
  communicator_.AllReduce(BufferOf(std::span(status)), Reduction::kSum)->Wait();
  std::lock_guard lock(mutex_);
  status_ = status;
  active_ = false;
  changed_.notify_all();
}

void Horovod::Reduce(const std::vector<size_t>& parameters) {
  const bool single = parameters_.parameters()[parameters[0]].tensor.scalar_type() == at::kFloat;
  const ElementType type = single ? ElementType::kFloat32 : ElementType::kFloat64;
  struct Piece {
    char* gradient;
    int64_t bytes;
    size_t bucket;
  };
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (const size_t i : parameters) {
    const FlatParameters::Parameter& p = parameters_.parameters()[i];
    const at::Tensor& flat = ranges_[p.bucket].gradients;
    pieces.push_back({static_cast<char*>(flat.data_ptr()) +
                          p.offset * static_cast<int64_t>(flat.element_size()),
                      static_cast<int64_t>(p.tensor.nbytes()), p.bucket});
    total += pieces.back().bytes;
  }
  fusion_.resize(static_cast<size_t>(total));
  int64_t at = 0;
  for (const Piece& piece : pieces) {
    std::memcpy(fusion_.data() + at, piece.gradient, static_cast<size_t>(piece.bytes));
    at += piece.bytes;
  }
  const int64_t element = SizeInBytes(type);
  const Buffer fused{fusion_.data(), total / element, type};
  const char* result = fusion_.data();
  if (options_.adasum) {
    const int ranks = communicator_.size();
    gathered_.resize(static_cast<size_t>(total * ranks));
    communicator_.AllGather(fused, {gathered_.data(), fused.count * ranks, type})->Wait();
    at = 0;
    for (const Piece& piece : pieces) {  // each tensor by itself
      const auto combine = [&]<typename T>(T*) {
        std::vector<T*> all;
        for (int r = 0; r < ranks; ++r)
          all.push_back(reinterpret_cast<T*>(gathered_.data() + r * total + at));
        Adasum(std::span<T*>(all), piece.bytes / element);
      };
      single ? combine(static_cast<float*>(nullptr)) : combine(static_cast<double*>(nullptr));
      at += piece.bytes;
    }
    result = gathered_.data();
  } else {
    communicator_.AllReduce(fused, Reduction::kSum)->Wait();
  }
  at = 0;
  for (const Piece& piece : pieces) {
    std::memcpy(piece.gradient, result + at, static_cast<size_t>(piece.bytes));
    at += piece.bytes;
  }
  std::lock_guard lock(mutex_);
  for (const size_t i : parameters) {
    states_[i] = State::kReduced;
    --missing_[parameters_.parameters()[i].bucket];
  }
  changed_.notify_all();
}

std::vector<StateSlice> Horovod::Owned(std::vector<StateSlice> held) const {
  return PartOf(held, communicator_.rank(), communicator_.size());
}

std::vector<int> Horovod::FindDifferingRanks(Communicator& control) {
  return FindDiffering(HashValues(parameters_), control);
}

std::vector<int64_t> Horovod::Unused() const {
  std::vector<int64_t> unused;
  for (const int64_t used : used_) unused.push_back(used ? 0 : 1);
  return unused;
}

Strategy::Memory Horovod::memory() const {
  Memory memory = MemoryOfWholeBuckets(parameters_);
  memory.peak_gradients += options_.fusion_bytes;
  return memory;
}

}  // namespace itwin::worker

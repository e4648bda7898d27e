#include "agent/worker/training/horovod.h"

#include <algorithm>
#include <chrono>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// `count` elements of the type, from what is there if it is enough.
at::Tensor Room(at::Tensor* buffer, int64_t count, const at::TensorOptions& options) {
  if (!buffer->defined() || buffer->numel() < count || buffer->scalar_type() != options.dtype())
    *buffer = at::empty({count}, options);
  return buffer->narrow(0, 0, count);
}

}  // namespace

void Adasum(const std::vector<at::Tensor>& ranks) {
  // 1 - ab / 2aa, or 1 where there is no a. As tensors: on a device nobody waits for them.
  const auto share = [](const at::Tensor& ab, const at::Tensor& aa) {
    return at::where(aa.gt(0), ab.div(aa).mul(-0.5).add(1), at::ones_like(aa));
  };
  for (size_t step = 1; step < ranks.size(); step *= 2) {
    for (size_t r = 0; r + step < ranks.size(); r += 2 * step) {
      const at::Tensor &a = ranks[r], &b = ranks[r + step];
      const at::Tensor x = a.to(at::kDouble), y = b.to(at::kDouble);
      const at::Tensor xy = x.dot(y);
      const at::Tensor sum = x.mul(share(xy, x.dot(x))).add_(y.mul(share(xy, y.dot(y))));
      at::Tensor(a).copy_(sum);
    }
  }
}

Horovod::Horovod(FlatParameters& parameters, Communicator& communicator, Options options)
    : parameters_(parameters),
      communicator_(communicator),
      compute_(CurrentStream(parameters.buckets()[0].values.device())),
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
  status_ = status;
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
  return status_;
}

void Horovod::Run() {
  const at::NoGradGuard no_grad;
  const StreamScope scope(compute_);
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
  exchange_.Start(status_, communicator_);
  const StepStatus status = exchange_.Finish();
  std::lock_guard lock(mutex_);
  status_ = status;
  active_ = false;
  changed_.notify_all();
}

void Horovod::Reduce(const std::vector<size_t>& parameters) {
  struct Piece {
    at::Tensor gradient;
    int64_t first;  // in the fused tensor
  };
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (const size_t i : parameters) {
    const FlatParameters::Parameter& p = parameters_.parameters()[i];
    pieces.push_back({ranges_[p.bucket].gradients.narrow(0, p.offset, p.tensor.numel()), total});
    total += p.tensor.numel();
  }
  const at::TensorOptions options = pieces[0].gradient.options();
  const at::Tensor fused = Room(&fusion_, total, options);
  for (const Piece& piece : pieces) CopyFlat(fused.narrow(0, piece.first, piece.gradient.numel()), piece.gradient);
  at::Tensor result = fused;
  if (options_.adasum) {
    const int64_t ranks = communicator_.size();
    const at::Tensor all = Room(&gathered_, total * ranks, options);
    communicator_.AllGather(BufferOfTensor(fused), BufferOfTensor(all))->Wait();
    for (const Piece& piece : pieces) {  // each tensor by itself
      std::vector<at::Tensor> parts;
      for (int64_t r = 0; r < ranks; ++r)
        parts.push_back(all.narrow(0, r * total + piece.first, piece.gradient.numel()));
      Adasum(parts);
    }
    result = all.narrow(0, 0, total);
  } else {
    communicator_.AllReduce(BufferOfTensor(fused), Reduction::kSum)->Wait();
  }
  for (const Piece& piece : pieces) CopyFlat(piece.gradient, result.narrow(0, piece.first, piece.gradient.numel()));
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

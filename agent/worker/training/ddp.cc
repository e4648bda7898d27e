#include "agent/worker/training/ddp.h"

#include <chrono>

#include <ATen/ATen.h>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// As Compress does it.
at::Tensor Compressed(const at::Tensor& gradients, Compression format) {
  if (format == Compression::kBfloat16) return gradients.to(at::kBFloat16);
  constexpr double kLargest = 65504;
  return at::where(gradients.isfinite(), gradients.clamp(-kLargest, kLargest), gradients).to(at::kHalf);
}

}  // namespace

Ddp::Ddp(FlatParameters& parameters, Communicator& communicator, Options options)
    : parameters_(parameters),
      communicator_(communicator),
      options_(std::move(options)),
      ranges_(WholeBuckets(parameters)),
      used_(parameters.parameters().size(), 0),
      missing_(parameters.buckets().size(), 0),
      work_(parameters.buckets().size()),
      compressed_(parameters.buckets().size()),
      compressed_on_device_(parameters.buckets().size()),
      hooks_(parameters, [this](size_t i) { OnGradientReady(i); }) {
  for (const FlatRange& range : ranges_)
    communicator_.Broadcast(BufferOfTensor(range.values), 0)->Wait();
}

void Ddp::BeginBackward(const StepStatus& status, bool last) {
  last_ = last;
  parameters_.WriteStatus(status);
  for (size_t b = 0; b < missing_.size(); ++b) {
    missing_[b] = static_cast<int64_t>(parameters_.buckets()[b].parameters.size());
    work_[b].reset();
  }
  next_bucket_ = 0;
  if (last && options_.compression != Compression::kNone) {
    status_.Start(status, communicator_);
  }
}

void Ddp::OnGradientReady(size_t parameter) {
  used_[parameter] = 1;
  --missing_[parameters_.parameters()[parameter].bucket];
  if (options_.overlap && last_) LaunchReady();
}

void Ddp::LaunchReady() {
  // In order: all ranks must start the same collectives in the same order, whatever becomes ready
  // first.
  if (communicator_.size() == 1) return;
  while (next_bucket_ < missing_.size() && missing_[next_bucket_] <= 0) {
    work_[next_bucket_] = Launch(next_bucket_);
    ++next_bucket_;
  }
}

std::unique_ptr<Work> Ddp::Launch(size_t bucket) {
  if (options_.compression == Compression::kNone) {
    return communicator_.AllReduce(BufferOfTensor(parameters_.buckets()[bucket].gradients),
                                   Reduction::kSum);
  }
  const at::Tensor& gradients = ranges_[bucket].gradients;
  if (!gradients.is_cpu()) {
    compressed_on_device_[bucket] = Compressed(gradients, options_.compression);
    return communicator_.AllReduce(BufferOfTensor(compressed_on_device_[bucket]), Reduction::kSum);
  }
  std::vector<uint16_t>& small = compressed_[bucket];
  small.resize(static_cast<size_t>(gradients.numel()));
  if (gradients.scalar_type() == at::kFloat) {
    Compress(gradients.data_ptr<float>(), small.data(), gradients.numel(), options_.compression);
  } else {
    Compress(gradients.data_ptr<double>(), small.data(), gradients.numel(), options_.compression);
  }
  const ElementType type = options_.compression == Compression::kFloat16 ? ElementType::kFloat16
                                                                         : ElementType::kBfloat16;
  return communicator_.AllReduce({small.data(), gradients.numel(), type}, Reduction::kSum);
}

void Ddp::EndBackward() {
  if (!last_) return;
  // What backward did not reach has a zero gradient here; other ranks may have more.
  for (int64_t& missing : missing_) missing = 0;
  LaunchReady();
}

void Ddp::WaitGradients(size_t range) {
  if (!work_[range]) return;
  const auto start = std::chrono::steady_clock::now();
  work_[range]->Wait();
  work_[range].reset();
  if (options_.compression != Compression::kNone) {
    const at::Tensor& gradients = ranges_[range].gradients;
    if (!gradients.is_cpu()) {
      at::Tensor(gradients).copy_(compressed_on_device_[range]);
    } else if (gradients.scalar_type() == at::kFloat) {
      Expand(compressed_[range].data(), gradients.data_ptr<float>(), gradients.numel(),
             options_.compression);
    } else {
      Expand(compressed_[range].data(), gradients.data_ptr<double>(), gradients.numel(),
             options_.compression);
    }
  }
  waited_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

StepStatus Ddp::EndStep(bool* agreed) {
  *agreed = true;
  if (status_.under_way()) return status_.Finish();
  return parameters_.ReadStatus();
}

std::vector<StateSlice> Ddp::Owned(std::vector<StateSlice> held) const {
  return PartOf(held, communicator_.rank(), communicator_.size());
}

std::vector<int> Ddp::FindDifferingRanks(Communicator& control) {
  return FindDiffering(HashValues(parameters_), control);
}

std::vector<int64_t> Ddp::Unused() const {
  std::vector<int64_t> unused;
  for (int64_t used : used_) unused.push_back(used ? 0 : 1);
  return unused;
}

Strategy::Memory Ddp::memory() const { return MemoryOfWholeBuckets(parameters_); }

}  // namespace itwin::worker

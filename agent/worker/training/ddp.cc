#include "agent/worker/training/ddp.h"

#include <chrono>

#include "agent/worker/error.h"

namespace itwin::worker {

Ddp::Ddp(FlatParameters& parameters, Communicator& communicator, Options options)
    : parameters_(parameters),
      communicator_(communicator),
      options_(std::move(options)),
      ranges_(WholeBuckets(parameters)),
      used_(parameters.parameters().size(), 0),
      missing_(parameters.buckets().size(), 0),
      work_(parameters.buckets().size()),
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
    work_[next_bucket_] = communicator_.AllReduce(
        BufferOfTensor(parameters_.buckets()[next_bucket_].gradients), Reduction::kSum);
    ++next_bucket_;
  }
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
  waited_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

StepStatus Ddp::EndStep(bool* agreed) {
  *agreed = true;
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

Strategy::Memory Ddp::memory() const {
  Memory memory;
  for (const FlatParameters::Bucket& bucket : parameters_.buckets()) {
    memory.parameters += static_cast<int64_t>(bucket.values.nbytes());
    memory.gradients += static_cast<int64_t>(bucket.gradients.nbytes());
  }
  memory.peak_parameters = memory.parameters;
  memory.peak_gradients = memory.gradients;
  return memory;
}

}  // namespace itwin::worker

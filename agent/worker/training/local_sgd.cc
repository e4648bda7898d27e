#include "agent/worker/training/local_sgd.h"

#include <array>
#include <chrono>

namespace itwin::worker {

LocalSgd::LocalSgd(FlatParameters& parameters, Communicator& communicator, int every)
    : parameters_(parameters),
      communicator_(communicator),
      every_(every),
      ranges_(WholeBuckets(parameters)),
      used_(parameters.parameters().size(), 0),
      hooks_(parameters, [this](size_t i) { used_[i] = 1; }) {
  for (const FlatRange& range : ranges_)
    communicator_.Broadcast(BufferOfTensor(range.values), 0)->Wait();
}

StepStatus LocalSgd::EndStep(bool* agreed) {
  if (status_.on_device.defined()) return EndStepOnDevice(agreed);
  not_finite_ += status_.not_finite;
  *agreed = ++steps_ % every_ == 0;
  if (!*agreed) return {.loss = status_.loss};
  steps_ = 0;
  for (const FlatRange& range : ranges_) Average(range.values);
  std::array<double, 3> sums = {status_.loss / communicator_.size(), not_finite_, status_.stop};
  communicator_.AllReduce(BufferOf(std::span(sums)), Reduction::kSum)->Wait();
  not_finite_ = 0;
  return {.loss = sums[0], .not_finite = sums[1], .stop = sums[2]};
}

StepStatus LocalSgd::EndStepOnDevice(bool* agreed) {
  const at::Tensor bad = status_.on_device.narrow(0, 1, 1);
  not_finite_on_device_ = not_finite_on_device_.defined() ? not_finite_on_device_.add(bad) : bad.clone();
  *agreed = ++steps_ % every_ == 0;
  at::Tensor figures = status_.on_device.clone();
  if (!*agreed) {
    figures.narrow(0, 1, figures.numel() - 1).zero_();
    return {.on_device = figures};
  }
  steps_ = 0;
  for (const FlatRange& range : ranges_) Average(range.values);
  figures.narrow(0, 0, 1).div_(communicator_.size());
  figures.narrow(0, 1, 1).copy_(not_finite_on_device_);
  not_finite_on_device_.reset();
  communicator_.AllReduce(BufferOfTensor(figures), Reduction::kSum)->Wait();
  return {.on_device = figures};
}

void LocalSgd::Consolidate(const std::vector<at::Tensor>& state) {
  if (steps_ > 0) {
    for (const FlatRange& range : ranges_) Average(range.values);
  }
  for (const at::Tensor& flat : state) Average(flat);
  steps_ = 0;
}

void LocalSgd::Average(const at::Tensor& flat) {
  const auto start = std::chrono::steady_clock::now();
  communicator_.AllReduce(BufferOfTensor(flat), Reduction::kSum)->Wait();
  at::Tensor(flat).div_(communicator_.size());
  waited_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::vector<StateSlice> LocalSgd::Owned(std::vector<StateSlice> held) const {
  return PartOf(held, communicator_.rank(), communicator_.size());
}

std::vector<int> LocalSgd::FindDifferingRanks(Communicator& control) {
  return FindDiffering(HashValues(parameters_), control);
}

std::vector<int64_t> LocalSgd::Unused() const {
  std::vector<int64_t> unused;
  for (const int64_t used : used_) unused.push_back(used ? 0 : 1);
  return unused;
}

Strategy::Memory LocalSgd::memory() const { return MemoryOfWholeBuckets(parameters_); }

}  // namespace itwin::worker

#include "agent/worker/training/local_sgd.h"

#include <algorithm>
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
  trace_ = std::max(trace_, status_.trace);
  *agreed = ++steps_ % every_ == 0;
  if (!*agreed) return {.loss = status_.loss};
  steps_ = 0;
  for (const FlatRange& range : ranges_) Average(range.values);
  std::array<double, StepStatus::kFigures> sums = {status_.loss / communicator_.size(), not_finite_, status_.stop,
                                                   trace_};
  communicator_.AllReduce(BufferOf(std::span(sums)), Reduction::kSum)->Wait();
  not_finite_ = trace_ = 0;
  return StepStatus::Of(sums);
}

StepStatus LocalSgd::EndStepOnDevice(bool* agreed) {
  since_on_device_ = since_on_device_.defined() ? since_on_device_.add(status_.on_device) : status_.on_device.clone();
  *agreed = ++steps_ % every_ == 0;
  at::Tensor figures = status_.on_device.clone();
  if (!*agreed) {
    figures.narrow(0, 1, figures.numel() - 1).zero_();
    return {.on_device = figures};
  }
  steps_ = 0;
  for (const FlatRange& range : ranges_) Average(range.values);
  figures.narrow(0, 0, 1).div_(communicator_.size());
  for (const int64_t i : {1, 3}) figures.narrow(0, i, 1).copy_(since_on_device_.narrow(0, i, 1));
  since_on_device_.reset();
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

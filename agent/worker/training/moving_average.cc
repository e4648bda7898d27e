#include "agent/worker/training/moving_average.h"

#include <algorithm>
#include <map>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>

#include "agent/worker/error.h"

namespace itwin::worker {

namespace {
constexpr char kUpdates[] = "ema_updates", kPrefix[] = "ema/";
}  // namespace

MovingAverage::MovingAverage(FlatParameters& parameters, double decay)
    : parameters_(parameters), decay_(decay) {
  for (const FlatParameters::Bucket& bucket : parameters.buckets())
    averages_.push_back(bucket.values.clone());
}

void MovingAverage::Update() {
  const at::NoGradGuard no_grad;
  const double n = static_cast<double>(++updates_);
  const double decay = std::min(decay_, (1 + n) / (10 + n));
  for (size_t b = 0; b < averages_.size(); ++b)
    averages_[b].lerp_(parameters_.buckets()[b].values, 1 - decay);
}

void MovingAverage::Swap() {
  const at::NoGradGuard no_grad;
  for (size_t b = 0; b < averages_.size(); ++b) {
    at::Tensor& values = parameters_.buckets()[b].values;
    const at::Tensor weights = values.clone();
    values.copy_(averages_[b]);
    averages_[b].copy_(weights);
  }
}

NamedTensors MovingAverage::State() const {
  NamedTensors state;
  state.emplace_back(kUpdates, at::full({1}, at::Scalar(updates_), at::TensorOptions().dtype(at::kLong)));
  for (size_t i = 0; i < parameters_.parameters().size(); ++i) {
    const FlatParameters::Parameter& p = parameters_.parameters()[i];
    state.emplace_back(kPrefix + p.name, parameters_.ViewOf(averages_[p.bucket], i));
  }
  return state;
}

void MovingAverage::LoadState(const NamedTensors& state) {
  const std::map<std::string, at::Tensor> by_name(state.begin(), state.end());
  for (auto& [name, target] : State()) {
    const auto found = by_name.find(name);
    if (found == by_name.end() || found->second.sizes() != target.sizes()) {
      throw AppError("the checkpoint's moving average does not fit: " + name + " is missing or has another shape");
    }
    if (name == kUpdates) {
      updates_ = found->second.data_ptr<int64_t>()[0];
    } else {
      target.copy_(found->second);
    }
  }
}

}  // namespace itwin::worker

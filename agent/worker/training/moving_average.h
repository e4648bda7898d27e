// An exponential moving average of the weights, which is what is evaluated and given back.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/training/flat_parameters.h"

namespace itwin::worker {

class MovingAverage {
 public:
  // Begins as the weights of now. `parameters` must outlive it.
  MovingAverage(FlatParameters& parameters, double decay);

  // After each step: average = d · average + (1 - d) · weights, with d = min(decay, (1 + n) / (10 + n))
  // for the n-th update, so that the first weights are soon forgotten.
  void Update();

  // Exchanges weights and average; twice is nothing.
  void Swap();

  // "ema/<parameter>", and "ema_updates". Views, valid until the next update.
  NamedTensors State() const;
  // Throws AppError when it does not fit.
  void LoadState(const NamedTensors& state);

 private:
  FlatParameters& parameters_;
  const double decay_;
  int64_t updates_ = 0;
  std::vector<at::Tensor> averages_;  // per bucket, laid out like its values
};

}  // namespace itwin::worker

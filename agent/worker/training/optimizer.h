// The optimiser on flat buckets: one pass per bucket updates the parameters and clears the
// gradients. Formulas and defaults are PyTorch's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/spec/train_spec.h"
#include "agent/worker/training/flat_parameters.h"

namespace itwin::worker {

class Optimizer {
 public:
  // `parameters` must outlive it.
  Optimizer(const OptimizerSpec& spec, FlatParameters& parameters);

  // A step is BeginStep and then StepBucket for every bucket, in any order. The gradient is
  // multiplied by `gradient_scale` first, and is zero afterwards.
  void BeginStep() { ++step_; }
  void StepBucket(size_t bucket, double gradient_scale);

  // "<state>/<parameter>" and "step"; views, valid until the next step.
  NamedTensors State() const;
  // Throws AppError when it does not fit these parameters and this optimiser.
  void LoadState(const NamedTensors& state);

  std::string name() const;

 private:
  const OptimizerSpec spec_;
  FlatParameters& parameters_;
  int64_t step_ = 0;
  std::vector<std::string> state_names_;
  std::vector<std::vector<at::Tensor>> state_;  // [bucket][state name], flat
};

// Square root of the sum of squares of all gradients: the same bits on every rank once they are
// reduced.
double GradientNorm(const FlatParameters& parameters);

}  // namespace itwin::worker

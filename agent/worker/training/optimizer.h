// The optimiser on flat ranges (a bucket, or a rank's shard of one): one pass per range updates the
// parameters and clears the gradients. Formulas and defaults are PyTorch's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/spec/train_spec.h"
#include "agent/worker/training/flat_parameters.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

class Optimizer {
 public:
  // `parameters` must outlive it; `ranges` are a strategy's (Strategy::ranges()).
  Optimizer(const OptimizerSpec& spec, const FlatParameters& parameters,
            std::vector<FlatRange> ranges);

  // A step is BeginStep and then StepRange for every range, in any order. The gradient is
  // multiplied by `gradient_scale` first, and is zero afterwards.
  void BeginStep() { ++step_; }
  void StepRange(size_t range, double gradient_scale);

  int64_t step() const { return step_; }
  // What this rank holds, as "<state>/<parameter>"; the views stay.
  std::vector<StateSlice> Slices() const;
  // All state as flat tensors, range by range; the tensors stay.
  std::vector<at::Tensor> FlatState() const;
  // "step", and "<state>/<parameter>" for every parameter, whole. Throws AppError when it does not
  // fit these parameters and this optimiser.
  void LoadState(const NamedTensors& state);

  std::string name() const;

 private:
  const OptimizerSpec spec_;
  const FlatParameters& parameters_;
  const std::vector<FlatRange> ranges_;
  int64_t step_ = 0;
  std::vector<std::string> state_names_;
  std::vector<std::vector<at::Tensor>> state_;  // [range][state name], flat
};

// The whole state on rank 0, for LoadState; what this strategy holds on the others is sent there.
// Every rank calls it.
NamedTensors GatherState(const Optimizer& optimizer, const Strategy& strategy,
                         Communicator& communicator);

// Sum of squares of the gradients in the ranges.
double SumOfSquares(const std::vector<FlatRange>& ranges);
// Whether every parameter in the ranges is a finite number.
bool AllFinite(const std::vector<FlatRange>& ranges);

}  // namespace itwin::worker

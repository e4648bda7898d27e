// The optimiser on flat ranges (a bucket, or a rank's shard of one): one pass per range updates the
// parameters and clears the gradients. Formulas and defaults are PyTorch's.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/spec/train_spec.h"
#include "agent/worker/training/flat_parameters.h"
#include "agent/worker/training/lbfgs.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

class Optimizer {
 public:
  // `parameters` must outlive it; `ranges` are a strategy's (Strategy::ranges()).
  // `only` are patterns of the parameters that it updates, empty: all; `name` is that of its step in
  // the state, where there are several optimisers.
  Optimizer(const OptimizerSpec& spec, const FlatParameters& parameters,
            std::vector<FlatRange> ranges, const std::vector<ParameterGroupSpec>& groups = {},
            const std::vector<std::string>& only = {}, const std::string& name = "");

  // A step is BeginStep and then StepRange for every range, in any order. The learning rate is
  // multiplied by `lr_factor` (ScheduleFactor). The gradient is multiplied by `gradient_scale`
  // first, and is zero afterwards.
  void BeginStep(double lr_factor = 1);
  void StepRange(size_t range, double gradient_scale);

  // LAMB and LARS: a parameter's step follows from its whole length. Between BeginStep and the first
  // StepRange, MeasureRange is called for every range with the same scale, and norms() are added up
  // over the ranks that hold the other parts (Strategy::SumOverShards).
  bool needs_norms() const;
  void MeasureRange(size_t range, double gradient_scale);
  std::vector<double>& norms() { return norms_; }

  // LBFGS: a step looks at the loss several times. After BeginStep, in place of StepRange.
  bool searches() const { return lbfgs_.has_value(); }
  LbfgsMinimizer::Result Search(const LbfgsMinimizer::Evaluate& evaluate);

  // Of the step begun last, for parameters of no group.
  double learning_rate() const;

  int64_t step() const { return step_; }
  // Whether it updates the parameter, by index.
  bool Has(size_t parameter) const { return mine_[parameter]; }
  // What this rank holds, as "<state>/<parameter>"; the views stay.
  std::vector<StateSlice> Slices() const;
  // What every rank holds alike beside them: the number of steps, and what else is no parameter's.
  NamedTensors WholeState() const;
  // All state as flat tensors, range by range; the tensors stay.
  std::vector<at::Tensor> FlatState() const;
  // WholeState's, and "<state>/<parameter>" for every parameter, whole. Throws AppError when it does not
  // fit these parameters and this optimiser. `strategy` says where a rank's parameters lie in whole
  // ones (Strategy::InWhole); without it they are whole.
  void LoadState(const NamedTensors& state, const Strategy* strategy = nullptr);

  std::string name() const;

  // Of a device the step is made of LibTorch's operators; for tests: of the host's memory, too.
  void UseOperators() { operators_ = true; }

 private:
  // A run of elements of a range that are treated alike: those of neighbours with the same options, or
  // of one parameter, where its length matters.
  struct Segment {
    int64_t first = 0, last = 0;
    size_t parameter = 0;
    OptimizerSpec spec;  // with the group's rate and decay
  };
  void AddSegments(const FlatRange& range, const std::vector<ParameterGroupSpec>& groups);
  void StepByOperators(size_t range, double gradient_scale);
  template <typename F>
  void OnRange(size_t range, F f);  // f(pointers, segment) for each segment

  const OptimizerSpec spec_;
  const FlatParameters& parameters_;
  const std::string step_name_;
  std::vector<bool> mine_;  // by parameter
  const std::vector<FlatRange> ranges_;
  std::vector<std::vector<Segment>> segments_;  // [range]
  std::vector<double> norms_;  // two per parameter: squared lengths of it and of its step
  int64_t step_ = 0;
  double lr_factor_ = 1;
  bool operators_ = false;
  std::vector<std::string> state_names_;
  std::vector<std::vector<at::Tensor>> state_;  // [range][state name], flat
  std::optional<LbfgsMinimizer> lbfgs_;
};

// Sum of squares of the gradients in the ranges.
double SumOfSquares(const std::vector<FlatRange>& ranges);
// Whether every parameter in the ranges is a finite number.
bool AllFinite(const std::vector<FlatRange>& ranges);

}  // namespace itwin::worker

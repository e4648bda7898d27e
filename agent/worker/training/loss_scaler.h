// The loss scale of fp16 training: small gradients would vanish in half precision, so the loss is
// multiplied before backward and the gradients divided after it. The scale falls when gradients
// overflow and rises after a while without. Constants and rules are DeepSpeed's.
#pragma once

#include <cstdint>

#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {

class LossScaler {
 public:
  struct State {
    double scale = 65536;
    int64_t good_steps = 0;  // since the scale changed or gradients overflowed
    int64_t hysteresis = 2;  // overflows that are still borne before the scale falls
    int64_t skipped = 0;     // steps left out because of overflow, in all
  };

  explicit LossScaler(const LossScaleSpec& spec);

  double scale() const { return state_.scale; }

  // After the gradients of a step are there on all ranks; `overflow` must be the same on every rank.
  // Says whether the step may be taken. Throws AppError when the gradients overflow at the smallest
  // scale: then it is not the scale's fault.
  bool Update(bool overflow);

  const State& state() const { return state_; }
  void Restore(const State& state) { state_ = state; }

 private:
  const LossScaleSpec spec_;
  State state_;
};

}  // namespace itwin::worker

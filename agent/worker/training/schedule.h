// The learning rate as a function of the step: everything but `plateau` is pure, so a run that goes
// on from a checkpoint, on any number of ranks, has the rates it would have had.
#pragma once

#include <cstdint>
#include <limits>

#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {

// How long the run is; lengths that a schedule leaves out come from here.
struct RunLength {
  int64_t steps = 0;           // all of them
  int64_t steps_per_epoch = 1;
};

// Factor of the optimiser's rate in step `step`, from 0. Closed forms (docs/training.md); equal to
// PyTorch's schedulers of these names, called once per step or, with `unit: epoch`, once per epoch.
// After its length a schedule keeps its last value. For `plateau` it is the warm-up alone. Always a
// finite number from 0; what would grow beyond 1e30 stays there.
double ScheduleFactor(const ScheduleSpec& spec, const RunLength& run, int64_t step);

// The state of `plateau`: lowers the factor when the metric has not improved for `patience`
// evaluations. PyTorch's ReduceLROnPlateau with a relative threshold.
class Plateau {
 public:
  struct State {
    double factor = 1;
    double best = std::numeric_limits<double>::quiet_NaN();  // none yet
    int64_t bad = 0;       // evaluations without improvement
    int64_t cooldown = 0;  // evaluations still to let pass
  };

  explicit Plateau(const PlateauSchedule& spec) : spec_(spec) {}

  // After an evaluation; the same value on every rank, so all ranks agree. One that is not finite is
  // no improvement. Says whether the factor changed.
  bool Observe(double value);

  const State& state() const { return state_; }
  void Restore(const State& state) { state_ = state; }

 private:
  const PlateauSchedule spec_;
  State state_;
};

}  // namespace itwin::worker

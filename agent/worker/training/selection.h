// Watching a metric of the evaluations: when to stop, and which weights were the best. The values are
// the same on every rank, so all ranks decide alike.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <utility>

namespace itwin::worker {

class MetricWatch {
 public:
  struct State {
    double best = std::numeric_limits<double>::quiet_NaN();  // none yet
    int64_t best_step = -1;
    int64_t bad = 0;  // evaluations since
  };

  // Better is lower, or higher with `maximize`, by more than `min_delta`.
  MetricWatch(std::string metric, bool maximize, double min_delta = 0)
      : metric_(std::move(metric)), maximize_(maximize), min_delta_(min_delta) {}

  const std::string& metric() const { return metric_; }

  // Says whether the value is the best so far. One that is not finite never is.
  bool Observe(double value, int64_t step);

  const State& state() const { return state_; }
  void Restore(const State& state) { state_ = state; }

 private:
  const std::string metric_;
  const bool maximize_;
  const double min_delta_;
  State state_;
};

}  // namespace itwin::worker

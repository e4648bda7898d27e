#include "agent/worker/training/selection.h"

#include <cmath>

namespace itwin::worker {

bool MetricWatch::Observe(double value, int64_t step) {
  const bool better = std::isfinite(value) && (std::isnan(state_.best) ? true
                                               : maximize_ ? value > state_.best + min_delta_
                                                           : value < state_.best - min_delta_);
  if (better) {
    state_ = {.best = value, .best_step = step, .bad = 0};
  } else {
    ++state_.bad;
  }
  return better;
}

}  // namespace itwin::worker

#include "agent/worker/training/loss_scaler.h"

#include <algorithm>

#include "agent/worker/error.h"

namespace itwin::worker {

namespace {
constexpr double kFactor = 2;
constexpr int64_t kEndlessOverflow = 50;  // overflows in a row at the smallest scale
}  // namespace

LossScaler::LossScaler(const LossScaleSpec& spec) : spec_(spec) {
  state_.scale = spec.initial;
  state_.hysteresis = spec.hysteresis;
}

bool LossScaler::Update(bool overflow) {
  if (overflow) {
    ++state_.skipped;
    if (state_.scale <= spec_.smallest) {
      state_.good_steps = std::min<int64_t>(state_.good_steps, 0) - 1;  // counts down
      if (state_.good_steps <= -kEndlessOverflow) {
        throw AppError("the gradients are not finite in fp16 even at the smallest loss scale; use precision bf16 or "
                       "fp32, or a smaller learning rate");
      }
    } else {
      state_.good_steps = 0;
    }
    if (state_.hysteresis <= 1) {
      state_.scale = std::max(state_.scale / kFactor, spec_.smallest);
    } else {
      --state_.hysteresis;
    }
    return false;
  }
  state_.good_steps = std::max<int64_t>(state_.good_steps, 0) + 1;
  if (state_.good_steps >= spec_.window) {
    state_.good_steps = 0;
    state_.hysteresis = spec_.hysteresis;
    state_.scale *= kFactor;
  }
  return true;
}

}  // namespace itwin::worker

#include "agent/worker/training/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace itwin::worker {
namespace {

constexpr double kLargestFactor = 1e30;  // beyond any use; its products with a rate are numbers in float32, too

// From `from` to `to` as `share` goes from 0 to 1, along half a cosine.
double HalfCosine(double from, double to, double share) {
  return to + (from - to) / 2 * (1 + std::cos(std::numbers::pi * share));
}

double Bounded(double factor) { return std::clamp(factor, 0.0, kLargestFactor); }

struct Factor {
  double t;      // units since the schedule began
  double whole;  // units it has

  double LengthOr(int64_t given) const {
    return given > 0 ? static_cast<double>(given) : std::max(1.0, whole);
  }

  double operator()(const ConstantSchedule&) const { return 1; }
  double operator()(const LinearSchedule& s) const {
    return s.start + (s.end - s.start) * std::min(1.0, t / LengthOr(s.length));
  }
  double operator()(const StepSchedule& s) const {
    return std::pow(s.gamma, std::floor(t / static_cast<double>(s.every)));
  }
  double operator()(const MultiStepSchedule& s) const {
    const auto passed = std::count_if(s.milestones.begin(), s.milestones.end(), [&](int64_t m) {
      return static_cast<double>(m) <= t;
    });
    return std::pow(s.gamma, static_cast<double>(passed));
  }
  double operator()(const ExponentialSchedule& s) const { return std::pow(s.gamma, t); }
  double operator()(const CosineSchedule& s) const {
    return HalfCosine(1, s.min_factor, std::min(1.0, t / LengthOr(s.length)));
  }
  double operator()(const OneCycleSchedule& s) const {
    // The last step is number length - 1; the top lies at rise * length - 1.
    const double last = LengthOr(s.length) - 1, top = s.rise * LengthOr(s.length) - 1;
    const double initial = Bounded(1 / s.initial_divisor), final = Bounded(initial / s.final_divisor);
    const auto along = [&](double from, double to, double share) {
      return s.linear ? from + (to - from) * share : HalfCosine(from, to, share);
    };
    if (t <= top) return along(initial, 1, top > 0 ? t / top : 1);
    return along(1, final, last > top ? std::min(1.0, (t - top) / (last - top)) : 1);
  }
  double operator()(const PolynomialSchedule& s) const {
    const double left = 1 - std::min(1.0, t / LengthOr(s.length));
    return s.min_factor + (1 - s.min_factor) * std::pow(left, s.power);
  }
  double operator()(const PlateauSchedule&) const { return 1; }
};

}  // namespace

double ScheduleFactor(const ScheduleSpec& spec, const RunLength& run, int64_t step) {
  if (step < spec.warmup_steps) {
    const double share = static_cast<double>(step) / static_cast<double>(spec.warmup_steps);
    return Bounded(spec.warmup_start + (1 - spec.warmup_start) * share);
  }
  int64_t t = step - spec.warmup_steps, whole = run.steps - spec.warmup_steps;
  if (spec.epochs) {
    const int64_t per_epoch = std::max<int64_t>(1, run.steps_per_epoch);
    t /= per_epoch;
    whole = (whole + per_epoch - 1) / per_epoch;
  }
  return Bounded(std::visit(Factor{static_cast<double>(t), static_cast<double>(whole)}, spec.kind));
}

bool Plateau::Observe(double value) {
  const double best = state_.best;
  const bool better =
      std::isfinite(value) && (std::isnan(best)  ? true
                               : spec_.maximize ? value > best * (1 + spec_.threshold)
                                                : value < best * (1 - spec_.threshold));
  if (better) {
    state_.best = value;
    state_.bad = 0;
  } else {
    ++state_.bad;
  }
  if (state_.cooldown > 0) {
    --state_.cooldown;
    state_.bad = 0;
  }
  if (state_.bad <= spec_.patience) return false;
  state_.bad = 0;
  state_.cooldown = spec_.cooldown;
  const double lower = std::max(state_.factor * spec_.factor, spec_.min_factor);
  const bool changed = lower < state_.factor;
  state_.factor = std::min(state_.factor, lower);
  return changed;
}

}  // namespace itwin::worker

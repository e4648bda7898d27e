#include "agent/worker/training/schedule.h"

#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

namespace itwin::worker {
namespace {

constexpr int64_t kSteps[] = {0, 1, 5, 9, 10, 15, 19};

// Factors at kSteps against those of torch.optim.lr_scheduler (PyTorch 1.13, float64).
void ExpectFactors(const ScheduleSpec& spec, const std::vector<double>& expected,
                   const RunLength& run = {.steps = 20, .steps_per_epoch = 5}) {
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(ScheduleFactor(spec, run, kSteps[i]), expected[i], 1e-8) << "step " << kSteps[i];
  }
}

TEST(Schedule, EqualsPyTorch) {
  ExpectFactors({.kind = ConstantSchedule{}}, {1, 1, 1, 1, 1, 1, 1});
  ExpectFactors({.kind = LinearSchedule{.start = 0.25, .end = 0.75, .length = 15}},
                {0.25, 0.283333333, 0.416666667, 0.55, 0.583333333, 0.75, 0.75});
  ExpectFactors({.kind = StepSchedule{.every = 4, .gamma = 0.3}},
                {1, 1, 0.3, 0.09, 0.09, 0.027, 0.0081});
  ExpectFactors({.kind = MultiStepSchedule{.milestones = {5, 10, 15}, .gamma = 0.3}},
                {1, 1, 0.3, 0.3, 0.09, 0.027, 0.027});
  ExpectFactors({.kind = ExponentialSchedule{.gamma = 0.9}},
                {1, 0.9, 0.59049, 0.387420489, 0.34867844, 0.205891132, 0.135085172});
  ExpectFactors({.kind = CosineSchedule{.min_factor = 0.1}},
                {1, 0.994459753, 0.868198052, 0.620395509, 0.55, 0.231801948, 0.105540247});
  ExpectFactors({.kind = OneCycleSchedule{}},
                {0.04, 0.131671843, 1, 0.811745654, 0.716943002, 0.188258346, 4e-06});
  ExpectFactors({.kind = OneCycleSchedule{.rise = 0.4,
                                          .initial_divisor = 10,
                                          .final_divisor = 100,
                                          .linear = true}},
                {0.1, 0.228571429, 0.742857143, 0.8335, 0.75025, 0.334, 0.001});
  ExpectFactors({.kind = PolynomialSchedule{.length = 15, .power = 2}},
                {1, 0.871111111, 0.444444444, 0.16, 0.111111111, 0, 0});
}

TEST(Schedule, LastsTheWholeRunUnlessGivenALength) {
  const ScheduleSpec cosine{.kind = CosineSchedule{}};
  EXPECT_NEAR(ScheduleFactor(cosine, {.steps = 1000}, 500), 0.5, 1e-12);
  EXPECT_NEAR(ScheduleFactor(cosine, {.steps = 1000}, 2000), 0, 1e-12);  // stays
}

TEST(Schedule, EpochsAreCountedWhole) {
  const ScheduleSpec spec{.kind = StepSchedule{.every = 2, .gamma = 0.1}, .epochs = true};
  const RunLength run{.steps = 30, .steps_per_epoch = 5};
  EXPECT_NEAR(ScheduleFactor(spec, run, 9), 1, 1e-12);
  EXPECT_NEAR(ScheduleFactor(spec, run, 10), 0.1, 1e-12);
  EXPECT_NEAR(ScheduleFactor(spec, run, 20), 0.01, 1e-12);
}

TEST(Schedule, WarmUpRisesLinearlyAndThenTheScheduleBegins) {
  const ScheduleSpec spec{
      .kind = CosineSchedule{}, .warmup_steps = 10, .warmup_start = 0.2};
  const RunLength run{.steps = 110, .steps_per_epoch = 11};
  EXPECT_NEAR(ScheduleFactor(spec, run, 0), 0.2, 1e-12);
  EXPECT_NEAR(ScheduleFactor(spec, run, 5), 0.6, 1e-12);
  EXPECT_NEAR(ScheduleFactor(spec, run, 10), 1, 1e-12);
  EXPECT_NEAR(ScheduleFactor(spec, run, 60), 0.5, 1e-12);
  EXPECT_NEAR(ScheduleFactor(spec, run, 110), 0, 1e-12);
}

// Its top lies at rise · length - 1 = 0, where PyTorch divides by zero.
TEST(Schedule, OneCycleMayBeginAtItsTop) {
  const ScheduleSpec spec{.kind = OneCycleSchedule{.length = 10, .rise = 0.1}};
  EXPECT_EQ(ScheduleFactor(spec, {.steps = 20}, 0), 1);
  EXPECT_LT(ScheduleFactor(spec, {.steps = 20}, 1), 1);
  EXPECT_NEAR(ScheduleFactor(spec, {.steps = 20}, 9), 4e-6, 1e-12);
  EXPECT_EQ(ScheduleFactor({.kind = OneCycleSchedule{.length = 10, .rise = 0.1, .linear = true}}, {.steps = 20}, 0), 1);
}

// Whatever a document may hold (common/spec/check_train.cc): a finite rate that is not below 0.
TEST(Schedule, EveryFactorIsFinite) {
  constexpr double kTiny = 1e-310, kHuge = 1e308;
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const std::vector<int64_t> lengths = {0, 1, 2, 3, 10, 1000, kMost};
  const std::vector<double> factors = {0, kTiny, 1e-4, 0.3, 1, 2, 1e6, kHuge}, above = {kTiny, 1e-4, 0.3, 1, 2, 1e6, kHuge};
  std::vector<decltype(ScheduleSpec::kind)> kinds = {ConstantSchedule{}, PlateauSchedule{}};
  for (const double gamma : above) {
    kinds.push_back(ExponentialSchedule{.gamma = gamma});
    kinds.push_back(MultiStepSchedule{.milestones = {1, 2, 3, kMost}, .gamma = gamma});
    for (const int64_t every : {int64_t{1}, int64_t{7}, kMost}) kinds.push_back(StepSchedule{.every = every, .gamma = gamma});
  }
  for (const int64_t length : lengths) {
    for (const double a : factors) {
      kinds.push_back(CosineSchedule{.length = length, .min_factor = a});
      for (const double b : factors) kinds.push_back(LinearSchedule{.start = a, .end = b, .length = length});
      for (const double power : above) kinds.push_back(PolynomialSchedule{.length = length, .power = power, .min_factor = a});
    }
    for (const double rise : {kTiny, 0.001, 0.1, 1.0 / 3, 0.5, 0.9, 0.999999}) {
      for (const double initial : above) {
        for (const double final : above) {
          for (const bool linear : {false, true}) {
            kinds.push_back(OneCycleSchedule{
                .length = length, .rise = rise, .initial_divisor = initial, .final_divisor = final, .linear = linear});
          }
        }
      }
    }
  }
  int64_t bad = 0;
  for (size_t k = 0; k < kinds.size(); ++k) {
    for (const bool epochs : {false, true}) {
      for (const int64_t warmup : {int64_t{0}, int64_t{3}, int64_t{5000}}) {
        const bool own_rise = std::holds_alternative<OneCycleSchedule>(kinds[k]);
        if (own_rise && warmup > 0) continue;  // refused
        const ScheduleSpec spec{.kind = kinds[k], .epochs = epochs, .warmup_steps = warmup, .warmup_start = kHuge};
        for (const RunLength& run : {RunLength{.steps = 1, .steps_per_epoch = 1}, {.steps = 20, .steps_per_epoch = 7}, {.steps = 4000, .steps_per_epoch = 4000}}) {
          for (const int64_t step : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{3}, int64_t{9}, int64_t{19}, run.steps, run.steps + 1, 10 * run.steps}) {
            const double factor = ScheduleFactor(spec, run, step);
            if (std::isfinite(factor) && factor >= 0) continue;
            if (++bad <= 20) ADD_FAILURE() << factor << ": kind " << kinds[k].index() << " (" << k << "), step " << step << " of " << run.steps << ", warm-up " << warmup;
          }
        }
      }
    }
  }
  EXPECT_EQ(bad, 0);
}

// The same values through torch.optim.lr_scheduler.ReduceLROnPlateau.
TEST(Plateau, EqualsPyTorch) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const double values[] = {1,   0.9, 0.899, 0.898, 0.897, 0.5, 0.6, 0.6,  0.6,
                           0.6, 0.6, 0.6,   0.6,   0.6,   0.6, 0.6, kNaN, 0.4};
  const double expected[] = {1,    1,    1,    1,   0.5, 0.5, 0.5, 0.5, 0.25,
                             0.25, 0.25, 0.25, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2};
  const PlateauSchedule spec{
      .factor = 0.5, .patience = 2, .threshold = 1e-2, .cooldown = 1, .min_factor = 0.2};
  Plateau plateau(spec), resumed(spec);
  for (size_t i = 0; i < std::size(values); ++i) {
    plateau.Observe(values[i]);
    EXPECT_DOUBLE_EQ(plateau.state().factor, expected[i]) << i;
    resumed.Observe(values[i]);
    Plateau other(spec);
    other.Restore(resumed.state());
    resumed.Restore(other.state());
    EXPECT_DOUBLE_EQ(resumed.state().factor, expected[i]);
  }
}

TEST(Plateau, AValueThatIsNotFiniteIsNoImprovement) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
  for (const bool maximize : {false, true}) {
    for (const double value : {kNaN, kInfinity, -kInfinity}) {
      Plateau plateau({.factor = 0.5, .patience = 1, .maximize = maximize});
      EXPECT_FALSE(plateau.Observe(value));  // the first
      EXPECT_TRUE(plateau.Observe(value));
      EXPECT_FALSE(plateau.Observe(3));
      EXPECT_EQ(plateau.state().best, 3);
      EXPECT_FALSE(plateau.Observe(value));
      EXPECT_TRUE(plateau.Observe(value));
      EXPECT_EQ(plateau.state().best, 3);
    }
  }
}

TEST(Plateau, MayMaximise) {
  Plateau plateau({.factor = 0.5, .patience = 0, .maximize = true});
  EXPECT_FALSE(plateau.Observe(0.5));
  EXPECT_FALSE(plateau.Observe(0.6));
  EXPECT_TRUE(plateau.Observe(0.55));
}

}  // namespace
}  // namespace itwin::worker

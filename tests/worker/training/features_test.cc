// Loss scaler, moving average, precision and the watching of metrics, each alone.
#include <cmath>
#include <limits>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/error.h"
#include "agent/worker/training/loss_scaler.h"
#include "agent/worker/training/moving_average.h"
#include "agent/worker/training/precision.h"
#include "agent/worker/training/selection.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {
namespace {

TEST(LossScaler, FallsAfterTheHysteresisAndRisesAfterTheWindow) {
  LossScaler scaler({.initial = 1024, .window = 3, .hysteresis = 2, .smallest = 1});
  EXPECT_FALSE(scaler.Update(true));  // borne
  EXPECT_EQ(scaler.scale(), 1024);
  EXPECT_FALSE(scaler.Update(true));
  EXPECT_EQ(scaler.scale(), 512);
  EXPECT_FALSE(scaler.Update(true));  // the hysteresis comes back with the window alone
  EXPECT_EQ(scaler.scale(), 256);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(scaler.Update(false));
  EXPECT_EQ(scaler.scale(), 512);
  EXPECT_FALSE(scaler.Update(true));
  EXPECT_EQ(scaler.scale(), 512);
  EXPECT_EQ(scaler.state().skipped, 4);
}

TEST(LossScaler, OverflowAtTheSmallestScaleIsAnError) {
  LossScaler scaler({.initial = 2, .window = 3, .hysteresis = 1, .smallest = 1});
  const auto overflow = [&] {
    for (int i = 0; i < 100; ++i) scaler.Update(true);
  };
  EXPECT_THROW(overflow(), WorkerError);
  EXPECT_EQ(scaler.scale(), 1);
}

TEST(MovingAverage, FollowsTheFormulaAndSwaps) {
  at::Tensor p = at::zeros({3}).requires_grad_(true), q = at::zeros({2, 2}).requires_grad_(true);
  FlatParameters flat({{"p", p}, {"q", q}}, 1, 1);
  MovingAverage average(flat, 0.3);
  double expected = 0;
  for (int n = 1; n <= 5; ++n) {
    {
      const at::NoGradGuard no_grad;
      p.fill_(n);
      q.fill_(-n);
    }
    average.Update();
    const double decay = std::min(0.3, (1.0 + n) / (10.0 + n));
    expected = decay * expected + (1 - decay) * n;
  }
  average.Swap();
  EXPECT_NEAR(p[0].item<double>(), expected, 1e-6);
  EXPECT_NEAR(q[1][1].item<double>(), -expected, 1e-6);
  average.Swap();
  EXPECT_EQ(p[0].item<double>(), 5);

  MovingAverage other(flat, 0.3);
  NamedTensors copy;
  for (const auto& [name, tensor] : average.State()) copy.emplace_back(name, tensor.clone());
  other.LoadState(copy);
  average.Update();
  other.Update();
  EXPECT_TRUE(average.State()[1].second.equal(other.State()[1].second));
  EXPECT_THROW(other.LoadState({}), WorkerError);
}

TEST(MetricWatch, KeepsTheBestAndCountsTheRest) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  MetricWatch watch("validation/rmse", /*maximize=*/false, /*min_delta=*/0.1);
  EXPECT_FALSE(watch.Observe(kNaN, 1));
  EXPECT_TRUE(watch.Observe(1.0, 2));
  EXPECT_FALSE(watch.Observe(0.95, 3));  // not by more than 0.1
  EXPECT_TRUE(watch.Observe(0.85, 4));
  EXPECT_FALSE(watch.Observe(kNaN, 5));
  EXPECT_FALSE(watch.Observe(0.9, 6));
  EXPECT_EQ(watch.state().best_step, 4);
  EXPECT_EQ(watch.state().bad, 2);
  MetricWatch most("validation/accuracy", /*maximize=*/true);
  EXPECT_TRUE(most.Observe(0.5, 1));
  EXPECT_TRUE(most.Observe(0.6, 2));
  EXPECT_FALSE(most.Observe(0.55, 3));
}

TEST(MetricWatch, NothingInfiniteIsTheBest) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const bool maximize : {false, true}) {
    MetricWatch watch("validation/loss", maximize);
    for (const double value : {kInfinity, -kInfinity}) EXPECT_FALSE(watch.Observe(value, 1));
    EXPECT_TRUE(watch.Observe(2, 2));
    for (const double value : {kInfinity, -kInfinity}) EXPECT_FALSE(watch.Observe(value, 3));
    EXPECT_EQ(watch.state().best_step, 2);
    EXPECT_EQ(watch.state().bad, 2);
  }
}

TEST(ChooseStrategy, SaysWhatOneRankDoesInstead) {
  const auto note = [](const std::string& strategy, int every) {
    TrainSpec spec;
    spec.strategy = strategy;
    spec.local_sgd.every = every;
    std::string text;
    EXPECT_EQ(ChooseStrategy(spec, 1, &text), "single");
    return text;
  };
  EXPECT_EQ(note("", 0), "");
  EXPECT_EQ(note("single", 0), "");
  EXPECT_EQ(note("", 1), "");
  EXPECT_EQ(note("zero2", 0), "ran single because the job has one rank (asked for: zero2)");
  EXPECT_EQ(note("", 8), "ran single because the job has one rank (asked for: local_sgd)");
  EXPECT_EQ(note("ddp", 8), "ran single because the job has one rank (asked for: ddp with local_sgd)");
}

TEST(Precision, Bfloat16ComputesInSixteenBitsAndTrainsInThirtyTwo) {
  RequirePrecision(Precision::kBfloat16);
  at::Tensor weight = at::ones({4, 4}).requires_grad_(true);
  at::Tensor output;
  {
    const AutocastScope autocast(Precision::kBfloat16);
    output = at::linear(at::ones({2, 4}), weight);
    EXPECT_EQ(output.scalar_type(), at::kBFloat16);
  }
  EXPECT_EQ(at::linear(at::ones({2, 4}), weight).scalar_type(), at::kFloat);
  output.to(at::kFloat).sum().backward();
  EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
  {
    const AutocastScope autocast(Precision::kFloat32);
    EXPECT_EQ(at::linear(at::ones({2, 4}), weight).scalar_type(), at::kFloat);
  }
}

TEST(Precision, ACastOfAWeightIsForgottenWithItsScope) {
  at::Tensor weight = at::ones({4, 4}).requires_grad_(true);
  const auto product = [&] {
    const AutocastScope autocast(Precision::kBfloat16);
    return at::linear(at::ones({2, 4}), weight).sum().item<double>();
  };
  EXPECT_EQ(product(), 32);
  {
    const at::NoGradGuard no_grad;
    weight.fill_(2);
  }
  EXPECT_EQ(product(), 64);
}

TEST(Precision, WhatCannotRunIsSaid) {
  try {
    RequirePrecision(Precision::kFloat16);
  } catch (const WorkerError& error) {  // LibTorch 1.13 has no such products on the CPU
    EXPECT_THAT(error.what(), ::testing::AllOf(::testing::HasSubstr("train.precision"),
                                               ::testing::HasSubstr("fp16"), ::testing::HasSubstr("bf16")));
    EXPECT_EQ(error.failure, FailureClass::kUser);
  }
}

}  // namespace
}  // namespace itwin::worker

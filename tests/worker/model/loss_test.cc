#include "agent/worker/model/loss.h"

#include <cmath>

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::UserErrorOf;

at::Tensor Row(std::vector<double> values) {
  return at::tensor(values, at::kDouble).to(at::kFloat);
}
double Value(const at::Tensor& tensor) { return tensor.item<double>(); }

TEST(Loss, RegressionLossesAndMetricsAreMeans) {
  const at::Tensor prediction = Row({1, 2, 5}), target = Row({0, 2, 2});
  const std::vector<std::string> metrics = {"rmse", "mae", "mse"};
  const StepOutput mse = Loss("mse", metrics)(prediction, target);
  EXPECT_FLOAT_EQ(Value(mse.loss), 10.0 / 3);
  EXPECT_EQ(mse.metrics.size(), 2u);  // rmse travels as mse
  EXPECT_FLOAT_EQ(Value(mse.metrics.at("mse")), 10.0 / 3);
  EXPECT_FLOAT_EQ(Value(mse.metrics.at("mae")), 4.0 / 3);
  const StepOutput l1 = Loss("l1", metrics)(prediction, target);
  EXPECT_FLOAT_EQ(Value(l1.loss), 4.0 / 3);
  EXPECT_FLOAT_EQ(Value(l1.metrics.at("mse")), 10.0 / 3);
  EXPECT_FLOAT_EQ(Value(Loss("huber", {})(prediction, target).loss), (0.5 + 2.5) / 3);
  EXPECT_THAT(Loss("huber", {}).metrics(), ElementsAre("mse"));
}

TEST(Loss, ClassificationTakesScoresAndClassNumbers) {
  const at::Tensor scores = at::tensor({2.0, 0.0, 0.0, 3.0}, at::kFloat).view({2, 2});
  const at::Tensor labels = at::tensor({0, 0}, at::kLong);
  const double expected = (std::log1p(std::exp(-2.0)) + std::log1p(std::exp(3.0))) / 2;
  const StepOutput output = Loss("cross_entropy", {})(scores, labels);
  EXPECT_NEAR(Value(output.loss), expected, 1e-6);
  EXPECT_FLOAT_EQ(Value(output.metrics.at("accuracy")), 0.5);
  EXPECT_NEAR(Value(Loss("nll", {})(at::log_softmax(scores, 1), labels).loss), expected, 1e-6);
  EXPECT_NEAR(Value(Loss("cross_entropy", {})(scores, labels.unsqueeze(1)).loss), expected, 1e-6);
  // A mask: scores [samples, classes, rows, columns], labels [samples, rows, columns].
  const StepOutput mask =
      Loss("cross_entropy", {})(at::zeros({1, 4, 2, 2}), at::zeros({1, 2, 2}, at::kLong));
  EXPECT_NEAR(Value(mask.loss), std::log(4.0), 1e-6);
}

TEST(Loss, BinaryLogitsAcceptIntegersAndAColumn) {
  const StepOutput output = Loss("bce_logits", {})(at::tensor({3.0, -3.0}, at::kFloat).view({2, 1}),
                                                   at::tensor({1, 1}, at::kLong));
  EXPECT_NEAR(Value(output.loss), (std::log1p(std::exp(-3.0)) + std::log1p(std::exp(3.0))) / 2,
              1e-6);
  EXPECT_FLOAT_EQ(Value(output.metrics.at("accuracy")), 0.5);
}

TEST(Loss, GradientFlowsThroughTheLossAlone) {
  const at::Tensor prediction = Row({1, 2}).requires_grad_(true);
  const StepOutput output = Loss("l1", {"mse", "mae"})(prediction, Row({0, 0}));
  EXPECT_TRUE(output.loss.requires_grad());
  for (const auto& [name, metric] : output.metrics) EXPECT_FALSE(metric.requires_grad()) << name;
}

TEST(Loss, NamesWhatIsWrong) {
  EXPECT_THAT(UserErrorOf([] { Loss("crossentropy", {}); }),
              AllOf(HasSubstr("train.loss"), HasSubstr("did you mean \"cross_entropy\""),
                    HasSubstr("huber")));
  EXPECT_THAT(UserErrorOf([] { Loss("", {}); }), HasSubstr("name one of mse"));
  EXPECT_THAT(UserErrorOf([] { Loss("mse", {"acuracy"}); }),
              HasSubstr("did you mean \"accuracy\""));
  EXPECT_THAT(UserErrorOf([] { Loss("mse", {"accuracy"}); }),
              HasSubstr("cannot be measured with the loss mse"));
  EXPECT_THAT(UserErrorOf([] { Loss("nll", {"rmse"}); }),
              HasSubstr("cannot be measured with the loss nll"));
  EXPECT_THAT(UserErrorOf([] {
                Loss("mse", {})(at::zeros({2, 3}), at::zeros({2, 4}));
              }),
              AllOf(HasSubstr("[2, 3]"), HasSubstr("[2, 4]")));
  // Broadcasting would hide this one.
  EXPECT_THAT(UserErrorOf([] {
                Loss("mse", {})(at::zeros({4, 1}), at::zeros({1, 4}));
              }),
              HasSubstr("[4, 1]"));
  EXPECT_THAT(UserErrorOf([] {
                Loss("cross_entropy", {})(at::zeros({2, 3}), at::zeros({2}));
              }),
              HasSubstr("target holds floats"));
  EXPECT_THAT(UserErrorOf([] {
                Loss("cross_entropy", {})(at::zeros({2, 3}), at::zeros({2, 3}, at::kLong));
              }),
              HasSubstr("[samples, classes, …]"));
}

}  // namespace
}  // namespace itwin::worker

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

// 2 sin(a i + 0.3) in float64, as the reference program had it.
at::Tensor Sines(std::vector<int64_t> shape, double a = 0.7) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return at::arange(count, at::kDouble).mul(a).add(0.3).sin().mul(2).view(shape);
}
double LossOf(const Loss& loss, const at::Tensor& prediction, const at::Tensor& target) {
  return Value(loss(prediction, target).loss);
}

// Constants: torch.nn.functional of PyTorch 1.13; the CRPS of a Gaussian by numerical integration of
// (F(x) - 1[x > y])², the ensemble's by its double sum.
TEST(Loss, EqualsReferences) {
  const at::Tensor p = Sines({4, 3}), y = Sines({4, 3}, 1.9);
  const at::Tensor labels = at::tensor({0, 2, 1, 2}, at::kLong);
  EXPECT_NEAR(LossOf({"smooth_l1", {}, {.beta = 0.5}}, p, y), 1.2096879435, 1e-9);
  EXPECT_NEAR(LossOf({"huber", {}, {.delta = 0.5}}, p, y), 0.6048439717, 1e-9);
  EXPECT_NEAR(LossOf({"cross_entropy", {}, {.label_smoothing = 0.1}}, p, labels), 1.7503803241,
              1e-9);
  EXPECT_NEAR(LossOf({"cross_entropy", {}, {.class_weights = {1, 0.5, 3}}}, p, labels),
              3.3965558925, 1e-9);
  EXPECT_NEAR(LossOf({"kl_div", {}}, at::log_softmax(p, 1), at::softmax(y, 1)), 0.6100322563, 1e-9);
  EXPECT_NEAR(LossOf({"focal", {}}, p, labels), 1.3178077892, 1e-9);
  EXPECT_NEAR(LossOf({"gaussian_nll", {}}, p.narrow(1, 0, 2), y.narrow(1, 0, 1)), 0.9232168930,
              1e-9);
  EXPECT_NEAR(LossOf({"crps", {}}, p.narrow(1, 0, 2), y.narrow(1, 0, 1)), 0.93813001, 2e-8);
  const at::Tensor y1 = Sines({4, 1}, 1.9);
  EXPECT_NEAR(LossOf({"crps_ensemble", {}}, Sines({4, 5}), y1), 1.0333589898, 1e-9);
  EXPECT_NEAR(LossOf({"quantile", {}, {.quantiles = {0.1, 0.5, 0.9}}}, p, y1), 0.5557147725, 1e-9);
}

TEST(Loss, DiceIsOneMinusTwiceTheOverlap) {
  // Certain scores: class 1 where the mask is predicted.
  const at::Tensor predicted = at::tensor({1, 1, 0, 0, 1, 1, 1, 1}, at::kLong).view({2, 4});
  const at::Tensor truth = at::tensor({1, 0, 0, 0, 1, 1, 1, 1}, at::kLong).view({2, 4});
  const at::Tensor scores =
      at::one_hot(predicted, 2).transpose(1, 2).to(at::kFloat).mul(200).sub(100);
  // Sample 1: class 0 2·2/(2+3), class 1 2·1/(2+1). Sample 2: class 0 is absent, class 1 right.
  const double expected = 1 - (4.0 / 5 + 2.0 / 3 + 1e-9 / 1e-9 + 1) / 4;
  const Loss dice("dice", {"iou"}, {.smooth = 1e-9});
  EXPECT_NEAR(LossOf(dice, scores, truth), expected, 1e-6);
  EXPECT_NEAR(LossOf({"dice", {}, {.smooth = 1e-9}}, scores.select(1, 1), truth.to(at::kFloat)),
              1 - (2.0 / 3 + 1) / 2, 1e-6);
}

TEST(Loss, GradientsAreThoseOfTheFormulas) {
  // Central differences of every new loss.
  struct Row {
    Loss loss;
    at::Tensor prediction, target;
  };
  const at::Tensor y = Sines({4, 1}, 1.9), labels = at::tensor({0, 2, 1, 2}, at::kLong);
  const std::vector<Row> rows = {
      {{"smooth_l1", {}, {.beta = 0.5}}, Sines({4, 1}), y},
      {{"crps", {}}, Sines({4, 2}), y},
      {{"crps_ensemble", {}}, Sines({4, 5}), y},
      {{"gaussian_nll", {}}, Sines({4, 2}), y},
      {{"quantile", {}, {.quantiles = {0.2, 0.7}}}, Sines({4, 2}), y},
      {{"kl_div", {}}, Sines({4, 3}), at::softmax(Sines({4, 3}, 1.9), 1)},
      {{"focal", {}, {.class_weights = {1, 2, 0.5}}}, Sines({4, 3}), labels},
      {{"dice", {}}, Sines({4, 3}), labels},
  };
  for (const Row& row : rows) {
    const at::Tensor p = row.prediction.clone().requires_grad_(true);
    row.loss(p, row.target).loss.backward();
    for (int64_t i = 0; i < p.numel(); ++i) {
      at::Tensor up = row.prediction.clone(), down = row.prediction.clone();
      up.view(-1)[i] += 1e-6;
      down.view(-1)[i] -= 1e-6;
      const double slope =
          (LossOf(row.loss, up, row.target) - LossOf(row.loss, down, row.target)) / 2e-6;
      EXPECT_NEAR(p.grad().view(-1)[i].item<double>(), slope, 1e-7) << row.loss.name() << " " << i;
    }
  }
}

TEST(Loss, MoreMetrics) {
  const at::Tensor scores = at::tensor({5.0, 3.0, 1.0,  //
                                        1.0, 2.0, 3.0,  //
                                        3.0, 2.0, 1.0},
                                       at::kFloat)
                                .view({3, 3});
  const at::Tensor labels = at::tensor({0, 1, 2}, at::kLong);
  const StepOutput classes =
      Loss("cross_entropy", {"accuracy", "top_k", "confusion"}, {}, 2)(scores, labels);
  EXPECT_FLOAT_EQ(Value(classes.metrics.at("accuracy")), 1.0 / 3);
  EXPECT_FLOAT_EQ(Value(classes.metrics.at("top_k")), 2.0 / 3);
  EXPECT_TRUE(classes.sums.at("confusion").equal(
      at::tensor({1, 0, 0, 0, 0, 1, 1, 0, 0}, at::kDouble)));
  const StepOutput numbers =
      Loss("mse", {"bias", "r2"})(Row({1.5, 2.5, 3.5, 4.5}), Row({1, 2, 3, 4}));
  EXPECT_FLOAT_EQ(Value(numbers.metrics.at("bias")), 0.5);
  EXPECT_TRUE(numbers.sums.at("r2").equal(at::tensor({4.0, 10.0, 30.0, 1.0}, at::kDouble)));
  // The point that is compared: the mean of the Gaussian, the median.
  EXPECT_FLOAT_EQ(
      Value(Loss("crps", {"mse"})(at::tensor({1.0, 5.0}).view({1, 2}), at::tensor({3.0}).view({1, 1}))
                .metrics.at("mse")),
      4);
  EXPECT_TRUE(Loss("mse", {})(Row({1}), Row({1}), /*with_metrics=*/false).metrics.empty());
}

TEST(Loss, SaysWhichShapeWouldFit) {
  EXPECT_THAT(UserErrorOf([] { Loss("crps", {})(at::zeros({4, 3}), at::zeros({4, 1})); }),
              AllOf(HasSubstr("crps needs 2 numbers"), HasSubstr("[4, 3]")));
  EXPECT_THAT(UserErrorOf([] {
                Loss("focal", {}, {.class_weights = {1, 2}})(at::zeros({4, 3}),
                                                             at::zeros({4}, at::kLong));
              }),
              HasSubstr("has 2 weights, but the model puts out scores of 3 classes"));
  EXPECT_THAT(UserErrorOf([] { Loss("crps", {"accuracy"}); }), HasSubstr("r2 can"));
}

}  // namespace
}  // namespace itwin::worker

#include "agent/worker/training/summed_metrics.h"

#include <gtest/gtest.h>

namespace itwin::worker {
namespace {

// Rows are the truth. Class 2 never occurs and is never predicted.
const std::vector<double> kMatrix = {3, 1, 0,  //
                                     2, 4, 0,  //
                                     0, 0, 0};

TEST(SummedMetrics, ConfusionGivesMeansOverTheClassesThatOccur) {
  const auto metrics = MetricsOfSums({{"confusion", kMatrix}, {"iou", kMatrix}});
  EXPECT_DOUBLE_EQ(metrics.at("precision"), (3.0 / 5 + 4.0 / 5) / 2);
  EXPECT_DOUBLE_EQ(metrics.at("recall"), (3.0 / 4 + 4.0 / 6) / 2);
  EXPECT_DOUBLE_EQ(metrics.at("f1"), (6.0 / 9 + 8.0 / 11) / 2);
  EXPECT_DOUBLE_EQ(metrics.at("iou"), (3.0 / 6 + 4.0 / 7) / 2);
}

TEST(SummedMetrics, TheReportHasEachClass) {
  const nlohmann::json report = ConfusionReport(kMatrix);
  EXPECT_EQ(report["matrix"][1][0], 2);
  EXPECT_EQ(report["classes"].size(), 3u);
  EXPECT_EQ(report["classes"][0]["samples"], 4);
  EXPECT_DOUBLE_EQ(report["classes"][1]["precision"], 0.8);
  EXPECT_DOUBLE_EQ(report["classes"][2]["f1"], 0);
}

TEST(SummedMetrics, DeterminationComparesErrorWithSpread) {
  // y = 1, 2, 3, 4 against predictions off by 0.5 each: 1 - 4 · 0.25 / 5.
  EXPECT_DOUBLE_EQ(MetricsOfSums({{"r2", {4, 10, 30, 1}}}).at("r2"), 0.8);
}

}  // namespace
}  // namespace itwin::worker

#include "agent/worker/training/summed_metrics.h"

#include <cmath>

namespace itwin::worker {
namespace {

struct ClassCounts {
  double right = 0, predicted = 0, actual = 0;
  double precision() const { return predicted > 0 ? right / predicted : 0; }
  double recall() const { return actual > 0 ? right / actual : 0; }
  double f1() const {
    return predicted + actual > 0 ? 2 * right / (predicted + actual) : 0;
  }
};

std::vector<ClassCounts> CountClasses(const std::vector<double>& matrix) {
  const auto classes = static_cast<size_t>(std::lround(std::sqrt(matrix.size())));
  std::vector<ClassCounts> counts(classes);
  for (size_t truth = 0; truth < classes; ++truth) {
    for (size_t predicted = 0; predicted < classes; ++predicted) {
      const double n = matrix[truth * classes + predicted];
      counts[truth].actual += n;
      counts[predicted].predicted += n;
      if (truth == predicted) counts[truth].right += n;
    }
  }
  return counts;
}

}  // namespace

std::map<std::string, double> MetricsOfSums(
    const std::map<std::string, std::vector<double>>& sums) {
  std::map<std::string, double> metrics;
  if (const auto r2 = sums.find("r2"); r2 != sums.end()) {
    const double spread = r2->second[2] - r2->second[1] * r2->second[1] / r2->second[0];
    metrics["r2"] = 1 - r2->second[3] / spread;
  }
  // Means over the classes that occur, in the truth or in the prediction.
  if (const auto iou = sums.find("iou"); iou != sums.end()) {
    double sum = 0, present = 0;
    for (const ClassCounts& c : CountClasses(iou->second)) {
      const double either = c.actual + c.predicted - c.right;
      if (either == 0) continue;
      sum += c.right / either;
      ++present;
    }
    metrics["iou"] = sum / present;
  }
  if (const auto confusion = sums.find("confusion"); confusion != sums.end()) {
    double precision = 0, recall = 0, f1 = 0, present = 0;
    for (const ClassCounts& c : CountClasses(confusion->second)) {
      if (c.actual + c.predicted == 0) continue;
      precision += c.precision();
      recall += c.recall();
      f1 += c.f1();
      ++present;
    }
    metrics["precision"] = precision / present;
    metrics["recall"] = recall / present;
    metrics["f1"] = f1 / present;
  }
  return metrics;
}

nlohmann::json ConfusionReport(const std::vector<double>& matrix) {
  const std::vector<ClassCounts> counts = CountClasses(matrix);
  nlohmann::json rows = nlohmann::json::array(), classes = nlohmann::json::array();
  for (size_t truth = 0; truth < counts.size(); ++truth) {
    nlohmann::json row = nlohmann::json::array();
    for (size_t predicted = 0; predicted < counts.size(); ++predicted)
      row.push_back(std::llround(matrix[truth * counts.size() + predicted]));
    rows.push_back(std::move(row));
    const ClassCounts& c = counts[truth];
    classes.push_back({{"class", truth},
                       {"samples", std::llround(c.actual)},
                       {"precision", c.precision()},
                       {"recall", c.recall()},
                       {"f1", c.f1()}});
  }
  return {{"rows", "truth"}, {"columns", "prediction"}, {"matrix", rows}, {"classes", classes}};
}

}  // namespace itwin::worker

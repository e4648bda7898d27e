// Metrics that are no mean over samples: made from sums over a whole split, so they do not depend on
// batches and ranks.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace itwin::worker {

// The values that follow from StepOutput::sums, summed over a whole split: "r2"; "iou"; of
// "confusion" the unweighted means over classes "precision", "recall" and "f1".
std::map<std::string, double> MetricsOfSums(const std::map<std::string, std::vector<double>>& sums);

// The confusion matrix (row: the truth) with precision, recall, F1 and count of each class.
nlohmann::json ConfusionReport(const std::vector<double>& matrix);

}  // namespace itwin::worker

// Metrics of a model over a whole split: every sample exactly once, means weighted by samples over
// all ranks.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "agent/worker/data/dataset.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/model/model.h"

namespace itwin::worker {

struct Evaluation {
  // Means over samples: "loss" and the model's metrics; each mean square "mse" or "<x>_mse" also as
  // "rmse" or "<x>_rmse", its root; and what follows from the sums.
  std::map<std::string, double> metrics;
  std::map<std::string, std::vector<double>> sums;  // StepOutput::sums over all samples
};

// Every rank calls it and gets the same values. The model must be in evaluation mode; the split must
// not be empty. With `lockstep` every rank runs the model equally often, on a sample that does not
// count where it has none left. `each_batch` is called for each one.
Evaluation Evaluate(Model& model, const Dataset& dataset, Split split, int64_t batch,
                    Communicator& communicator, bool lockstep = false,
                    const std::function<void()>& each_batch = {});

// "<baseline>_rmse" over the split for each baseline of the dataset. Like Evaluate.
std::map<std::string, double> EvaluateBaselines(const Dataset& dataset, Split split, int64_t batch,
                                                Communicator& communicator);

// "mse" -> "rmse", "wind_mse" -> "wind_rmse"; "" for a name that is no mean square.
std::string RootName(const std::string& metric);

}  // namespace itwin::worker

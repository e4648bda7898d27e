// Losses and metrics by name. Every result is a scalar and a mean over the samples of the batch.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/model/model.h"

namespace itwin::worker {

class Loss {
 public:
  // `metrics` empty: accuracy for classes, mse for numbers. "rmse" is measured as its square,
  // "mse". Throws UserError for an unknown name, naming the nearest known one, and for a metric
  // that does not fit the loss.
  Loss(const std::string& name, const std::vector<std::string>& metrics);

  // With the gradient recorded for the loss alone. Throws UserError naming both shapes when they do
  // not fit.
  StepOutput operator()(const at::Tensor& prediction, const at::Tensor& target) const;

  const std::string& name() const { return name_; }
  const std::vector<std::string>& metrics() const { return metrics_; }
  // Whether the target holds class numbers, one per prediction vector.
  bool classifies() const { return name_ == "cross_entropy" || name_ == "nll"; }

 private:
  std::string name_;
  std::vector<std::string> metrics_;
};

}  // namespace itwin::worker

// Losses and metrics by name. Every result is a mean over the samples of the batch, or sums from
// which a value of the whole split follows; so results do not depend on how samples are spread over
// batches and ranks.
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
  Loss(const std::string& name, const std::vector<std::string>& metrics,
       const LossOptions& options = {}, int top_k = 5);

  // With the gradient recorded for the loss alone, and without metrics unless they are wanted.
  // Throws UserError naming both shapes when they do not fit.
  StepOutput operator()(const at::Tensor& prediction, const at::Tensor& target,
                        bool with_metrics = true) const;

  const std::string& name() const { return name_; }
  const std::vector<std::string>& metrics() const { return metrics_; }
  // Whether the target holds class numbers, one per prediction vector.
  bool classifies() const;
  // Whether the prediction is logarithms of probabilities; networks put out scores.
  bool wants_log_probabilities() const { return name_ == "nll" || name_ == "kl_div"; }
  // Numbers that the prediction has for each number of the target: 2 for a mean and the logarithm
  // of a variance, one per quantile. 0: the model decides (members of an ensemble).
  int64_t outputs_per_target() const;

 private:
  StepOutput OfClasses(const at::Tensor& prediction, const at::Tensor& target,
                       bool with_metrics) const;
  StepOutput OfMask(const at::Tensor& prediction, const at::Tensor& target,
                    bool with_metrics) const;
  StepOutput OfNumbers(const at::Tensor& prediction, const at::Tensor& target,
                       bool with_metrics) const;
  void AddConfusion(const at::Tensor& predicted, const at::Tensor& labels, int64_t classes,
                    StepOutput* output) const;
  at::Tensor ClassWeights(const at::Tensor& prediction) const;

  std::string name_;
  std::vector<std::string> metrics_;
  LossOptions options_;
  int top_k_;
};

}  // namespace itwin::worker

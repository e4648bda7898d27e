// A dataset of given tensors, for tests of models.
#pragma once

#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "agent/worker/data/dataset.h"

namespace itwin::worker::testing {

class FixedDataset : public Dataset {
 public:
  FixedDataset(at::Tensor input, at::Tensor target) : all_{{"input", input}, {"target", target}} {}

  int64_t size(Split split) const override {
    return split == Split::kTrain ? all_.at("input").size(0) : 0;
  }
  Batch Gather(Split, const std::vector<int64_t>& indices) const override {
    Batch batch;
    for (const auto& [name, tensor] : all_)
      batch[name] = tensor.index_select(0, at::tensor(indices, at::kLong));
    return batch;
  }
  std::vector<std::string> baselines() const override { return {}; }
  std::map<std::string, at::Tensor> BaselinePredictions(const Batch&) const override { return {}; }
  std::map<std::string, std::vector<int64_t>> sample_shapes() const override {
    std::map<std::string, std::vector<int64_t>> shapes;
    for (const auto& [name, tensor] : all_) shapes[name] = tensor.sizes().slice(1).vec();
    return shapes;
  }
  int64_t classes() const override {
    const at::Tensor& target = all_.at("target");
    return target.is_floating_point() ? 0 : target.max().item<int64_t>() + 1;
  }
  nlohmann::json preprocessing() const override {
    return {{"format", 1}, {"transforms", {"known"}}};
  }

  const Batch& all() const { return all_; }

 private:
  const Batch all_;
};

// Plain gradient descent on one batch; returns the loss before and after.
template <typename ModelType>
std::pair<double, double> Descend(ModelType* model, const Batch& batch, int steps, double rate) {
  const double before = model->EvaluationStep(batch).loss.template item<double>();
  for (int step = 0; step < steps; ++step) {
    for (auto& [name, parameter] : model->parameters()) {
      if (parameter.grad().defined()) parameter.mutable_grad().zero_();
    }
    model->TrainingStep(batch).loss.backward();
    const at::NoGradGuard no_grad;
    for (auto& [name, parameter] : model->parameters()) parameter.add_(parameter.grad(), -rate);
  }
  return {before, model->EvaluationStep(batch).loss.template item<double>()};
}

}  // namespace itwin::worker::testing

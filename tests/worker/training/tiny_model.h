// A small regression for tests of the loop: two linear layers with tanh between, float64 so that
// two ways of adding the same gradients differ by no more than 1e-12.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/data/dataset.h"
#include "agent/worker/model/model.h"

namespace itwin::worker::testing {

inline at::Tensor Wave(std::vector<int64_t> shape, double frequency, at::ScalarType type) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return at::arange(count, at::TensorOptions().dtype(type))
      .mul(frequency)
      .sin()
      .view(shape)
      .contiguous();
}

class TinyDataset : public Dataset {
 public:
  TinyDataset(int64_t train, int64_t validation, int64_t test, at::ScalarType type = at::kDouble)
      : sizes_{train, validation, test}, type_(type) {}

  int64_t size(Split split) const override { return sizes_[static_cast<int>(split)]; }
  Batch Gather(Split split, const std::vector<int64_t>& indices) const override {
    const double shift = 100.0 * static_cast<int>(split);
    at::Tensor input = at::empty({static_cast<int64_t>(indices.size()), 4},
                                 at::TensorOptions().dtype(at::kDouble));
    for (size_t i = 0; i < indices.size(); ++i) {
      for (int k = 0; k < 4; ++k) {
        input.data_ptr<double>()[4 * i + k] =
            std::sin(1.7 * static_cast<double>(indices[i]) + 0.9 * k + shift);
      }
      if (indices[i] == broken_sample && split == Split::kTrain) {
        input.data_ptr<double>()[4 * i] = std::numeric_limits<double>::quiet_NaN();
      }
    }
    {
      std::lock_guard lock(mutex_);
      for (int64_t i : indices) seen_.emplace_back(split, i);
    }
    at::Tensor target = input.sum(1, /*keepdim=*/true).mul(0.5).tanh();
    return {{"input", input.to(type_)}, {"target", target.to(type_)}};
  }
  std::vector<std::string> baselines() const override { return {"zero"}; }
  std::map<std::string, at::Tensor> BaselinePredictions(const Batch& batch) const override {
    return {{"zero", batch.at("target").mul(0)}};
  }
  std::map<std::string, std::vector<int64_t>> sample_shapes() const override {
    return {{"input", {4}}, {"target", {1}}};
  }
  int64_t classes() const override { return 0; }

  std::vector<int64_t> Seen(Split split) const {
    std::lock_guard lock(mutex_);
    std::vector<int64_t> indices;
    for (const auto& [s, i] : seen_) {
      if (s == split) indices.push_back(i);
    }
    return indices;
  }

  int64_t broken_sample = -1;  // its input is NaN

 private:
  const int64_t sizes_[3];
  const at::ScalarType type_;
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<Split, int64_t>> seen_;
};

class TinyModel : public Model {
 public:
  struct Options {
    at::ScalarType type = at::kDouble;
    bool unused = false;  // has a parameter that the loss does not use
    double dropout = 0;
    int corrupt_rank = -1;      // on this rank (the tests see to it) ...
    int64_t corrupt_step = -1;  // ... this forward flips a bit of a weight, as faulty memory would
    // Evaluations after so many training steps (not before the first number, not from the second) have no number.
    int64_t nan_from = -1, nan_until = std::numeric_limits<int64_t>::max();
    double start = 0.7;  // of the weights; ranks may differ, rank 0's count
  };
  TinyModel() : TinyModel(Options{}) {}
  explicit TinyModel(const Options& options) : options_(options) {
    parameters_ = {{"first.weight", Wave({4, 16}, options.start, options.type).mul(0.5)},
                   {"first.bias", Wave({16}, 1.3, options.type).mul(0.1)},
                   {"second.weight", Wave({16, 1}, 2.1, options.type).mul(0.5)},
                   {"second.bias", at::zeros({1}, at::TensorOptions().dtype(options.type))}};
    if (options.unused) parameters_.emplace_back("unused", Wave({5}, 1, options.type));
    for (auto& [name, tensor] : parameters_) tensor.requires_grad_(true);
    mean_ = at::zeros({4}, at::TensorOptions().dtype(options.type));
  }
  std::vector<std::pair<std::string, at::Tensor>> parameters() override { return parameters_; }
  std::vector<std::pair<std::string, at::Tensor>> buffers() override {
    return {{"running_mean", mean_}};
  }
  StepOutput TrainingStep(const Batch& batch) override {
    if (++steps_ == options_.corrupt_step) parameters_[0].second.detach().view({-1})[3] += 1e-9;
    // Like batch norm: a statistic that follows the local batches.
    mean_.mul_(0.9).add_(batch.at("input").mean(0), 0.1);
    at::Tensor output = Forward(batch.at("input"));
    return {.loss = at::mse_loss(output, batch.at("target")), .metrics = {}};
  }
  StepOutput EvaluationStep(const Batch& batch) override {
    at::NoGradGuard no_grad;
    at::Tensor mse = at::mse_loss(Forward(batch.at("input")), batch.at("target"));
    if (options_.nan_from >= 0 && steps_ >= options_.nan_from && steps_ < options_.nan_until)
      mse = mse.mul(std::numeric_limits<double>::quiet_NaN());
    return {.loss = mse,
            .metrics = {{"mse", mse}, {"samples_seen", batch.at("input").select(1, 0).mean()}}};
  }
  at::Tensor Predict(const at::Tensor& input) override { return Forward(input).detach(); }
  void Train(bool training) override { training_ = training; }
  void Save(const std::filesystem::path& dir) override {
    WriteSafetensors(dir / "weights.safetensors", parameters_);
  }
  std::string description() override { return "tiny"; }

 private:
  at::Tensor Forward(const at::Tensor& input) {
    at::Tensor hidden = input.matmul(parameters_[0].second).add(parameters_[1].second).tanh();
    if (options_.dropout > 0) hidden = at::dropout(hidden, options_.dropout, training_);
    return hidden.matmul(parameters_[2].second).add(parameters_[3].second);
  }

  const Options options_;
  std::vector<std::pair<std::string, at::Tensor>> parameters_;
  at::Tensor mean_;
  bool training_ = true;
  int64_t steps_ = 0;
};

}  // namespace itwin::worker::testing

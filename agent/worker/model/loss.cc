#include "agent/worker/model/loss.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "agent/worker/data/array.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

const std::vector<std::string> kLosses = {"mse",           "l1",         "huber",
                                          "cross_entropy", "bce_logits", "nll"};
const std::vector<std::string> kMetrics = {"accuracy", "mse", "rmse", "mae"};

void RequireKnown(const std::string& field, const std::string& name,
                  const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), name) != known.end()) return;
  throw UserError(field + ": unknown name \"" + name + "\"" + NearestHint(name, known) +
                  " (known: " + JoinNames(known) + ")");
}

std::string Shape(const at::Tensor& tensor) { return ShapeText(tensor.sizes().vec()); }

}  // namespace

Loss::Loss(const std::string& name, const std::vector<std::string>& metrics) : name_(name) {
  if (name.empty()) {
    throw UserError("train.loss: is not given and the model does not bring its own; name one of " +
                    JoinNames(kLosses));
  }
  RequireKnown("train.loss", name, kLosses);
  const bool classes = classifies() || name == "bce_logits";
  for (const std::string& metric : metrics) {
    RequireKnown("train.metrics", metric, kMetrics);
    if ((metric == "accuracy") != classes) {
      throw UserError("train.metrics: \"" + metric + "\" cannot be measured with the loss " + name +
                      (classes ? ", whose predictions are scores of classes; accuracy can"
                               : ", whose target has no classes; mse, rmse and mae can"));
    }
    const std::string measured = metric == "rmse" ? "mse" : metric;
    if (std::find(metrics_.begin(), metrics_.end(), measured) == metrics_.end())
      metrics_.push_back(measured);
  }
  if (metrics_.empty()) metrics_ = {classes ? "accuracy" : "mse"};
}

StepOutput Loss::operator()(const at::Tensor& prediction, const at::Tensor& target) const {
  StepOutput output;
  if (classifies()) {
    if (target.is_floating_point()) {
      throw UserError("train.loss: " + name_ +
                      " needs class numbers (integers) as target but the target holds floats; take "
                      "mse, l1, huber "
                      "or bce_logits, or save the target as integers");
    }
    // [samples, 1] labels are meant as [samples].
    const at::Tensor labels =
        target.dim() == prediction.dim() && target.size(1) == 1 ? target.squeeze(1) : target;
    std::vector<int64_t> expected = prediction.sizes().vec();
    if (expected.size() > 1) expected.erase(expected.begin() + 1);
    if (prediction.dim() < 2 || labels.sizes() != at::IntArrayRef(expected)) {
      throw UserError("train.loss: " + name_ +
                      " compares scores [samples, classes, …] with class numbers "
                      "[samples, …]; the model's output has shape " +
                      Shape(prediction) + " and the target " + Shape(target));
    }
    output.loss = name_ == "nll" ? at::nll_loss_nd(prediction, labels)
                                 : at::cross_entropy_loss(prediction, labels);
    output.metrics["accuracy"] = prediction.detach().argmax(1).eq(labels).to(at::kFloat).mean();
    return output;
  }

  at::Tensor truth = target.is_floating_point() ? target : target.to(at::kFloat);
  if (truth.sizes() != prediction.sizes() && truth.numel() == prediction.numel() &&
      (truth.dim() == 1 || prediction.dim() == 1)) {
    truth = truth.view(prediction.sizes());  // [samples] and [samples, 1] are the same thing
  }
  if (truth.sizes() != prediction.sizes()) {
    throw UserError("train.loss: " + name_ +
                    " compares like with like, but the model's output has shape " +
                    Shape(prediction) + " and the target " + Shape(target));
  }
  if (name_ == "mse") {
    output.loss = at::mse_loss(prediction, truth);
  } else if (name_ == "l1") {
    output.loss = at::l1_loss(prediction, truth);
  } else if (name_ == "huber") {
    output.loss = at::huber_loss(prediction, truth);
  } else {
    output.loss = at::binary_cross_entropy_with_logits(prediction, truth);
  }
  const at::NoGradGuard no_grad;
  const at::Tensor predicted = prediction.detach();
  for (const std::string& metric : metrics_) {
    if (metric == "accuracy") {
      output.metrics[metric] = predicted.gt(0).eq(truth.gt(0.5)).to(at::kFloat).mean();
    } else if (metric == "mae") {
      output.metrics[metric] = name_ == "l1" ? output.loss.detach() : at::l1_loss(predicted, truth);
    } else {
      output.metrics[metric] =
          name_ == "mse" ? output.loss.detach() : at::mse_loss(predicted, truth);
    }
  }
  return output;
}

}  // namespace itwin::worker

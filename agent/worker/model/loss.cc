#include "agent/worker/model/loss.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "agent/worker/data/array.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

const std::vector<std::string> kLosses = {
    "mse",       "l1",       "huber",        "cross_entropy", "bce_logits",    "nll",   "smooth_l1",
    "quantile",  "gaussian_nll", "crps", "crps_ensemble", "kl_div", "focal", "dice"};
const std::vector<std::string> kClassMetrics = {"accuracy", "top_k", "confusion", "iou"};
const std::vector<std::string> kNumberMetrics = {"mse", "rmse", "mae", "bias", "r2"};
constexpr double kLowestLogVariance = -13.8;  // a variance of about 1e-6, as PyTorch's eps

void RequireKnown(const std::string& field, const std::string& name,
                  const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), name) != known.end()) return;
  throw UserError(field + ": unknown name \"" + name + "\"" + NearestHint(name, known) +
                  " (known: " + JoinNames(known) + ")");
}

bool Contains(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string Shape(const at::Tensor& tensor) { return ShapeText(tensor.sizes().vec()); }

at::Tensor Float(const at::Tensor& tensor) {
  return tensor.is_floating_point() ? tensor : tensor.to(at::kFloat);
}

// A prediction [samples, parts · channels, …] as [samples, parts, channels, …], beside the target
// [samples, channels, …] (or [samples], as one channel).
struct Parts {
  at::Tensor prediction;
  at::Tensor target;
};
Parts SplitParts(const std::string& loss, const at::Tensor& prediction, const at::Tensor& target,
                 int64_t parts) {
  const at::Tensor truth = target.dim() == 1 ? target.unsqueeze(1) : target;
  const int64_t channels = truth.size(1);
  bool fits = prediction.dim() == truth.dim() && prediction.size(0) == truth.size(0) &&
              prediction.size(1) % channels == 0 &&
              (parts == 0 ? prediction.size(1) >= 2 * channels
                          : prediction.size(1) == parts * channels);
  for (int64_t d = 2; fits && d < truth.dim(); ++d) fits = prediction.size(d) == truth.size(d);
  if (!fits) {
    throw UserError("train.loss: " + loss + " needs " +
                    (parts == 0 ? std::string("2 or more members")
                                : std::to_string(parts) + " numbers") +
                    " for each number of the target, in the dimension after the sample: the "
                    "model's output has shape " +
                    Shape(prediction) + " and the target " + Shape(target));
  }
  std::vector<int64_t> shape = truth.sizes().vec();
  shape.insert(shape.begin() + 1, prediction.size(1) / channels);
  return {prediction.reshape(shape), truth};
}

// Mean of |a - b| over all pairs of different members, per element: from the sorted members, in
// memory of one copy.
at::Tensor MeanPairDistance(const at::Tensor& members) {  // [samples, members, …]
  const int64_t count = members.size(1);
  const at::Tensor sorted = std::get<0>(members.sort(1));
  std::vector<int64_t> shape(static_cast<size_t>(members.dim()), 1);
  shape[1] = count;
  // Member k is added in k differences and taken away in count - 1 - k.
  const at::Tensor weights =
      at::arange(count, members.options().requires_grad(false)).mul(2).sub(count - 1).view(shape);
  return sorted.mul(weights).sum(1).mul(2.0 / static_cast<double>(count * (count - 1)));
}

}  // namespace

Loss::Loss(const std::string& name, const std::vector<std::string>& metrics,
           const LossOptions& options, int top_k)
    : name_(name), options_(options), top_k_(top_k) {
  if (name.empty()) {
    throw UserError("train.loss: is not given and the model does not bring its own; name one of " +
                    JoinNames(kLosses));
  }
  RequireKnown("train.loss", name, kLosses);
  const bool classes = classifies() || name == "bce_logits";
  if (name == "kl_div" && !metrics.empty()) {
    throw UserError("train.metrics: the loss kl_div compares distributions and has no metric beside it");
  }
  std::vector<std::string> known = kClassMetrics;
  known.insert(known.end(), kNumberMetrics.begin(), kNumberMetrics.end());
  for (const std::string& metric : metrics) {
    RequireKnown("train.metrics", metric, known);
    if (Contains(kClassMetrics, metric) != classes) {
      throw UserError("train.metrics: \"" + metric + "\" cannot be measured with the loss " + name +
                      (classes ? ", whose predictions are scores of classes; "
                               : ", whose target has no classes; ") +
                      JoinNames(classes ? kClassMetrics : kNumberMetrics) + " can");
    }
    if (metric == "top_k" && (name == "bce_logits" || name == "dice")) {
      throw UserError("train.metrics: \"top_k\" cannot be measured with the loss " + name);
    }
    const std::string measured = metric == "rmse" ? "mse" : metric;
    if (!Contains(metrics_, measured)) metrics_.push_back(measured);
  }
  if (metrics_.empty() && name != "kl_div") metrics_ = {classes ? "accuracy" : "mse"};
}

bool Loss::classifies() const {
  return name_ == "cross_entropy" || name_ == "nll" || name_ == "focal" || name_ == "dice";
}

int64_t Loss::outputs_per_target() const {
  if (name_ == "gaussian_nll" || name_ == "crps") return 2;
  if (name_ == "quantile") return static_cast<int64_t>(options_.quantiles.size());
  return name_ == "crps_ensemble" ? options_.members : 1;
}

StepOutput Loss::operator()(const at::Tensor& prediction, const at::Tensor& target,
                            bool with_metrics) const {
  if (name_ == "dice" && target.is_floating_point()) return OfMask(prediction, target, with_metrics);
  if (classifies()) return OfClasses(prediction, target, with_metrics);
  if (name_ == "bce_logits") return OfMask(prediction, target, with_metrics);
  return OfNumbers(prediction, target, with_metrics);
}

at::Tensor Loss::ClassWeights(const at::Tensor& prediction) const {
  if (options_.class_weights.empty()) return {};
  if (static_cast<int64_t>(options_.class_weights.size()) != prediction.size(1)) {
    throw UserError("train.loss_options.class_weights: has " +
                    std::to_string(options_.class_weights.size()) +
                    " weights, but the model puts out scores of " +
                    std::to_string(prediction.size(1)) + " classes");
  }
  return at::tensor(options_.class_weights, at::kDouble)
      .to(prediction.options().requires_grad(false));
}

void Loss::AddConfusion(const at::Tensor& predicted, const at::Tensor& labels, int64_t classes,
                        StepOutput* output) const {
  if (!Contains(metrics_, "confusion") && !Contains(metrics_, "iou")) return;
  const at::Tensor counts = at::bincount((labels * classes + predicted).flatten(), {},
                                         classes * classes)
                                .to(at::kDouble);
  for (const char* name : {"confusion", "iou"}) {
    if (Contains(metrics_, name)) output->sums[name] = counts;
  }
}

StepOutput Loss::OfClasses(const at::Tensor& prediction, const at::Tensor& target,
                           bool with_metrics) const {
  StepOutput output;
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
  const at::Tensor weights = ClassWeights(prediction);
  // With class weights the loss stays a mean over samples. (PyTorch divides by the sum of the
  // weights of the batch, which would make it depend on who is in the batch.)
  const bool weighted = weights.defined();
  const int64_t reduction = weighted ? at::Reduction::Sum : at::Reduction::Mean;
  if (name_ == "nll") {
    output.loss = at::nll_loss_nd(prediction, labels, weights, reduction);
  } else if (name_ == "cross_entropy") {
    output.loss = at::cross_entropy_loss(prediction, labels, weights, reduction, -100,
                                         options_.label_smoothing);
  } else if (name_ == "focal") {
    const at::Tensor chosen =
        at::log_softmax(prediction, 1).gather(1, labels.unsqueeze(1)).squeeze(1);
    at::Tensor each = chosen.exp().neg().add(1).clamp_min(0).pow(options_.gamma).mul(chosen).neg();
    if (weighted) each = each.mul(weights.index_select(0, labels.flatten()).view(labels.sizes()));
    output.loss = weighted ? each.sum() : each.mean();
  } else {  // dice: 1 - 2 |A ∩ B| / (|A| + |B|), softly, per sample and class
    const int64_t samples = prediction.size(0), classes = prediction.size(1);
    const at::Tensor p = at::softmax(prediction, 1).reshape({samples, classes, -1});
    const at::Tensor t =
        at::one_hot(labels.reshape({samples, -1}), classes).transpose(1, 2).to(p.scalar_type());
    output.loss = ((p * t).sum(2).mul(2).add(options_.smooth) /
                   (p.sum(2) + t.sum(2)).add(options_.smooth))
                      .neg()
                      .add(1)
                      .mean();
  }
  if (weighted) output.loss = output.loss.div(static_cast<double>(labels.numel()));
  if (!with_metrics) return output;

  const at::NoGradGuard no_grad;
  const at::Tensor scores = prediction.detach();
  const at::Tensor predicted = scores.argmax(1);
  for (const std::string& metric : metrics_) {
    if (metric == "accuracy") {
      output.metrics[metric] = predicted.eq(labels).to(at::kFloat).mean();
    } else if (metric == "top_k") {
      const int64_t k = std::min<int64_t>(top_k_, scores.size(1));
      output.metrics[metric] = std::get<1>(scores.topk(k, 1))
                                   .eq(labels.unsqueeze(1))
                                   .any(1)
                                   .to(at::kFloat)
                                   .mean();
    }
  }
  AddConfusion(predicted, labels, scores.size(1), &output);
  return output;
}

StepOutput Loss::OfMask(const at::Tensor& prediction, const at::Tensor& target,
                        bool with_metrics) const {
  StepOutput output;
  at::Tensor truth = Float(target);
  if (truth.sizes() != prediction.sizes() && truth.numel() == prediction.numel() &&
      (truth.dim() == 1 || prediction.dim() == 1)) {
    truth = truth.view(prediction.sizes());  // [samples] and [samples, 1] are the same thing
  }
  if (truth.sizes() != prediction.sizes()) {
    throw UserError("train.loss: " + name_ +
                    " compares like with like, but the model's output has shape " +
                    Shape(prediction) + " and the target " + Shape(target));
  }
  if (name_ == "dice") {
    const at::Tensor p = prediction.sigmoid().flatten(1), t = truth.flatten(1);
    output.loss = ((p * t).sum(1).mul(2).add(options_.smooth) /
                   (p.sum(1) + t.sum(1)).add(options_.smooth))
                      .neg()
                      .add(1)
                      .mean();
  } else {
    output.loss = at::binary_cross_entropy_with_logits(prediction, truth);
  }
  if (!with_metrics) return output;
  const at::NoGradGuard no_grad;
  const at::Tensor predicted = prediction.detach().gt(0), actual = truth.gt(0.5);
  if (Contains(metrics_, "accuracy"))
    output.metrics["accuracy"] = predicted.eq(actual).to(at::kFloat).mean();
  AddConfusion(predicted.to(at::kLong), actual.to(at::kLong), 2, &output);
  return output;
}

StepOutput Loss::OfNumbers(const at::Tensor& prediction, const at::Tensor& target,
                           bool with_metrics) const {
  StepOutput output;
  at::Tensor truth = Float(target);
  at::Tensor point = prediction;  // what the metrics compare
  if (outputs_per_target() != 1) {
    const Parts parts = SplitParts(name_, prediction, truth, outputs_per_target());
    truth = parts.target;
    if (name_ == "quantile") {
      at::Tensor sum;
      double nearest = 2;
      for (size_t i = 0; i < options_.quantiles.size(); ++i) {
        const double q = options_.quantiles[i];
        const at::Tensor of_q = parts.prediction.select(1, static_cast<int64_t>(i));
        const at::Tensor error = truth - of_q;
        const at::Tensor pinball = at::maximum(error.mul(q), error.mul(q - 1)).mean();
        sum = sum.defined() ? sum + pinball : pinball;
        if (std::abs(q - 0.5) < nearest) {
          nearest = std::abs(q - 0.5);
          point = of_q;
        }
      }
      output.loss = sum.div(static_cast<double>(options_.quantiles.size()));
    } else if (name_ == "crps_ensemble") {
      point = parts.prediction.mean(1);
      // Of members drawn alike the second term is unbiased ("fair") with pairs of different ones.
      output.loss = (parts.prediction - truth.unsqueeze(1)).abs().mean() -
                    MeanPairDistance(parts.prediction).mean().mul(0.5);
    } else {
      point = parts.prediction.select(1, 0);
      const at::Tensor log_variance =
          parts.prediction.select(1, 1).clamp_min(kLowestLogVariance);
      if (name_ == "gaussian_nll") {
        output.loss =
            ((truth - point).square() * log_variance.neg().exp() + log_variance).mul(0.5).mean();
      } else {
        const at::Tensor deviation = log_variance.mul(0.5).exp();
        const at::Tensor z = (truth - point) / deviation;
        const at::Tensor density =
            z.square().mul(-0.5).exp().mul(1 / std::sqrt(2 * std::numbers::pi));
        output.loss = (deviation * (z * at::erf(z.mul(std::numbers::sqrt2 / 2)) +
                                    density.mul(2).sub(std::numbers::inv_sqrtpi)))
                          .mean();
      }
    }
  } else {
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
      output.loss = at::huber_loss(prediction, truth, at::Reduction::Mean, options_.delta);
    } else if (name_ == "smooth_l1") {
      output.loss = at::smooth_l1_loss(prediction, truth, at::Reduction::Mean, options_.beta);
    } else {  // kl_div: summed over the distribution, mean over what has one
      if (prediction.dim() < 2) {
        throw UserError("train.loss: kl_div compares distributions [samples, classes, …], but the model's output has shape " +
                        Shape(prediction));
      }
      output.loss = at::kl_div(prediction, truth, at::Reduction::Sum)
                        .div(static_cast<double>(truth.numel() / truth.size(1)));
    }
  }
  if (!with_metrics) return output;

  const at::NoGradGuard no_grad;
  const at::Tensor predicted = point.detach();
  for (const std::string& metric : metrics_) {
    if (metric == "mae") {
      output.metrics[metric] = name_ == "l1" ? output.loss.detach() : at::l1_loss(predicted, truth);
    } else if (metric == "mse") {
      output.metrics[metric] =
          name_ == "mse" ? output.loss.detach() : at::mse_loss(predicted, truth);
    } else if (metric == "bias") {
      output.metrics[metric] = (predicted - truth).mean();
    } else {  // r2: count, sum and sum of squares of the truth, sum of squared errors
      const at::Tensor y = truth.to(at::kDouble);
      output.sums[metric] = at::stack({at::scalar_tensor(y.numel(), y.options()), y.sum(),
                                       y.square().sum(), (y - predicted.to(at::kDouble)).square().sum()});
    }
  }
  return output;
}

}  // namespace itwin::worker

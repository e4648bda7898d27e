#include "agent/worker/training/optimizer.h"

#include <cmath>
#include <map>

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>

#include "agent/worker/error.h"
#include "agent/worker/training/optimizer_kernels.h"

namespace itwin::worker {
namespace {

constexpr int64_t kElementsPerThread = 1 << 16;  // below, a second thread does not pay

std::vector<std::string> StateNames(const OptimizerSpec& spec) {
  struct Visitor {
    std::vector<std::string> operator()(const Sgd& o) const {
      return o.momentum != 0 ? std::vector<std::string>{"momentum_buffer"}
                             : std::vector<std::string>{};
    }
    std::vector<std::string> operator()(const Adam&) const { return {"exp_avg", "exp_avg_sq"}; }
    std::vector<std::string> operator()(const AdamW&) const { return {"exp_avg", "exp_avg_sq"}; }
    std::vector<std::string> operator()(const RmsProp& o) const {
      return o.momentum != 0 ? std::vector<std::string>{"square_avg", "momentum_buffer"}
                             : std::vector<std::string>{"square_avg"};
    }
  };
  return std::visit(Visitor{}, spec);
}

template <typename T>
struct Ranges {
  T* values;
  T* gradients;
  T* state[2];
};

template <typename T>
void StepRange(const OptimizerSpec& spec, const Ranges<T>& r, int64_t first, int64_t last,
               int64_t step, double scale) {
  const int64_t n = last - first;
  T* p = r.values + first;
  T* g = r.gradients + first;
  T* s0 = r.state[0] == nullptr ? nullptr : r.state[0] + first;
  T* s1 = r.state[1] == nullptr ? nullptr : r.state[1] + first;
  if (const auto* sgd = std::get_if<Sgd>(&spec)) {
    kernels::Sgd(p, g, s0, n, scale,
                 {.lr = sgd->lr,
                  .momentum = sgd->momentum,
                  .dampening = sgd->dampening,
                  .weight_decay = sgd->weight_decay,
                  .nesterov = sgd->nesterov,
                  .first_step = step == 1});
  } else if (const auto* adam = std::get_if<Adam>(&spec)) {
    kernels::Adam(p, g, s0, s1, n, scale,
                  {.lr = adam->lr,
                   .beta1 = adam->beta1,
                   .beta2 = adam->beta2,
                   .eps = adam->eps,
                   .weight_decay = adam->weight_decay,
                   .decoupled = false,
                   .step = step});
  } else if (const auto* adamw = std::get_if<AdamW>(&spec)) {
    kernels::Adam(p, g, s0, s1, n, scale,
                  {.lr = adamw->lr,
                   .beta1 = adamw->beta1,
                   .beta2 = adamw->beta2,
                   .eps = adamw->eps,
                   .weight_decay = adamw->weight_decay,
                   .decoupled = true,
                   .step = step});
  } else {
    const RmsProp& rmsprop = std::get<RmsProp>(spec);
    kernels::RmsProp(p, g, s0, s1, n, scale,
                     {.lr = rmsprop.lr,
                      .alpha = rmsprop.alpha,
                      .eps = rmsprop.eps,
                      .weight_decay = rmsprop.weight_decay,
                      .momentum = rmsprop.momentum});
  }
}

}  // namespace

Optimizer::Optimizer(const OptimizerSpec& spec, FlatParameters& parameters)
    : spec_(spec), parameters_(parameters), state_names_(StateNames(spec)) {
  for (const FlatParameters::Bucket& bucket : parameters.buckets()) {
    std::vector<at::Tensor> states;
    for (size_t s = 0; s < state_names_.size(); ++s)
      states.push_back(at::zeros_like(bucket.values));
    state_.push_back(std::move(states));
  }
}

void Optimizer::StepBucket(size_t b, double gradient_scale) {
  FlatParameters::Bucket& bucket = parameters_.buckets()[b];
  const auto run = [&]<typename T>(T*) {
    Ranges<T> ranges{
        bucket.values.data_ptr<T>(), bucket.gradients.data_ptr<T>(), {nullptr, nullptr}};
    for (size_t s = 0; s < state_names_.size(); ++s) ranges.state[s] = state_[b][s].data_ptr<T>();
    at::parallel_for(0, bucket.values.numel(), kElementsPerThread,
                     [&](int64_t first, int64_t last) {
                       StepRange(spec_, ranges, first, last, step_, gradient_scale);
                     });
  };
  if (bucket.type == at::kFloat) {
    run(static_cast<float*>(nullptr));
  } else {
    run(static_cast<double*>(nullptr));
  }
}

NamedTensors Optimizer::State() const {
  NamedTensors state;
  state.emplace_back("step",
                     at::full({1}, at::Scalar(step_), at::TensorOptions().dtype(at::kLong)));
  const auto& parameters = parameters_.parameters();
  for (size_t s = 0; s < state_names_.size(); ++s) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      state.emplace_back(state_names_[s] + "/" + parameters[i].name,
                         parameters_.ViewOf(state_[parameters[i].bucket][s], i));
    }
  }
  return state;
}

void Optimizer::LoadState(const NamedTensors& state) {
  std::map<std::string, at::Tensor> by_name(state.begin(), state.end());
  for (auto& [name, target] : State()) {
    const auto found = by_name.find(name);
    if (found == by_name.end() || found->second.sizes() != target.sizes() ||
        found->second.scalar_type() != target.scalar_type()) {
      throw AppError("the checkpoint's optimiser state does not fit: " + name +
                     (found == by_name.end() ? " is missing" : " has another shape or type"));
    }
    if (name == "step") {
      step_ = found->second.data_ptr<int64_t>()[0];
    } else {
      target.copy_(found->second);
    }
  }
}

std::string Optimizer::name() const {
  constexpr const char* kNames[] = {"sgd", "adam", "adamw", "rmsprop"};
  return kNames[spec_.index()];
}

double GradientNorm(const FlatParameters& parameters) {
  double sum = 0;
  for (const FlatParameters::Bucket& b : parameters.buckets()) {
    const int64_t n = b.values.numel();  // without the status
    sum += b.type == at::kFloat ? kernels::SumOfSquares(b.gradients.data_ptr<float>(), n)
                                : kernels::SumOfSquares(b.gradients.data_ptr<double>(), n);
  }
  return std::sqrt(sum);
}

}  // namespace itwin::worker

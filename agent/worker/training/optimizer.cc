#include "agent/worker/training/optimizer.h"

#include <utility>

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

Optimizer::Optimizer(const OptimizerSpec& spec, const FlatParameters& parameters,
                     std::vector<FlatRange> ranges)
    : spec_(spec),
      parameters_(parameters),
      ranges_(std::move(ranges)),
      state_names_(StateNames(spec)) {
  for (const FlatRange& range : ranges_) {
    std::vector<at::Tensor> states;
    for (size_t s = 0; s < state_names_.size(); ++s) states.push_back(at::zeros_like(range.values));
    state_.push_back(std::move(states));
  }
}

void Optimizer::StepRange(size_t i, double gradient_scale) {
  const FlatRange& range = ranges_[i];
  const auto run = [&]<typename T>(T*) {
    Ranges<T> ranges{
        range.values.data_ptr<T>(), range.gradients.data_ptr<T>(), {nullptr, nullptr}};
    for (size_t s = 0; s < state_names_.size(); ++s) ranges.state[s] = state_[i][s].data_ptr<T>();
    at::parallel_for(0, range.values.numel(), kElementsPerThread,
                     [&](int64_t first, int64_t last) {
                       itwin::worker::StepRange(spec_, ranges, first, last, step_, gradient_scale);
                     });
  };
  if (range.values.scalar_type() == at::kFloat) {
    run(static_cast<float*>(nullptr));
  } else {
    run(static_cast<double*>(nullptr));
  }
}

std::vector<StateSlice> Optimizer::Slices() const {
  std::vector<StateSlice> slices;
  for (size_t s = 0; s < state_names_.size(); ++s) {
    for (size_t i = 0; i < ranges_.size(); ++i)
      AppendSlices(parameters_, ranges_[i], state_[i][s], state_names_[s] + "/", &slices);
  }
  return slices;
}

std::vector<at::Tensor> Optimizer::FlatState() const {
  std::vector<at::Tensor> flat;
  for (const auto& states : state_) flat.insert(flat.end(), states.begin(), states.end());
  return flat;
}

void Optimizer::LoadState(const NamedTensors& state) {
  ScatterSlices(state, Slices(), "the checkpoint's optimiser state");
  for (const auto& [name, tensor] : state) {
    if (name != "step") continue;
    step_ = tensor.item<int64_t>();
    return;
  }
  throw AppError("the checkpoint's optimiser state does not fit: step is missing");
}

NamedTensors GatherState(const Optimizer& optimizer, const Strategy& strategy,
                         Communicator& communicator) {
  NamedTensors state = GatherSlices(strategy.Owned(optimizer.Slices()), communicator);
  state.insert(state.begin(), {"step", at::full({1}, at::Scalar(optimizer.step()),
                                                at::TensorOptions().dtype(at::kLong))});
  return state;
}

std::string Optimizer::name() const {
  constexpr const char* kNames[] = {"sgd", "adam", "adamw", "rmsprop"};
  return kNames[spec_.index()];
}

double SumOfSquares(const std::vector<FlatRange>& ranges) {
  double sum = 0;
  for (const FlatRange& range : ranges) {
    const int64_t n = range.gradients.numel();
    sum += range.gradients.scalar_type() == at::kFloat
               ? kernels::SumOfSquares(range.gradients.data_ptr<float>(), n)
               : kernels::SumOfSquares(range.gradients.data_ptr<double>(), n);
  }
  return sum;
}

bool AllFinite(const std::vector<FlatRange>& ranges) {
  for (const FlatRange& range : ranges) {
    const int64_t n = range.values.numel();
    const bool finite = range.values.scalar_type() == at::kFloat
                            ? kernels::AllFinite(range.values.data_ptr<float>(), n)
                            : kernels::AllFinite(range.values.data_ptr<double>(), n);
    if (!finite) return false;
  }
  return true;
}

}  // namespace itwin::worker

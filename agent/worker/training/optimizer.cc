#include "agent/worker/training/optimizer.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>

#include "agent/worker/error.h"
#include "agent/worker/training/device_optimizer.h"
#include "agent/worker/training/optimizer_kernels.h"
#include "agent/worker/training/parameter_groups.h"

namespace itwin::worker {
namespace {

constexpr int64_t kElementsPerThread = 1 << 16;  // below, a second thread does not pay
constexpr char kLbfgsFigures[] = "lbfgs/figures";

std::vector<std::string> StateNames(const OptimizerSpec& spec) {
  struct Visitor {
    std::vector<std::string> operator()(const Sgd& o) const {
      return o.momentum != 0 ? std::vector<std::string>{"momentum_buffer"}
                             : std::vector<std::string>{};
    }
    std::vector<std::string> operator()(const Adam&) const { return {"exp_avg", "exp_avg_sq"}; }
    std::vector<std::string> operator()(const AdamW&) const { return {"exp_avg", "exp_avg_sq"}; }
    std::vector<std::string> operator()(const Adagrad&) const { return {"sum"}; }
    std::vector<std::string> operator()(const Lamb&) const { return {"exp_avg", "exp_avg_sq"}; }
    std::vector<std::string> operator()(const Lars& o) const {
      return o.momentum != 0 ? std::vector<std::string>{"momentum_buffer"}
                             : std::vector<std::string>{};
    }
    std::vector<std::string> operator()(const Lbfgs& o) const { return LbfgsMinimizer::StateNames(o); }
    std::vector<std::string> operator()(const RmsProp& o) const {
      return o.momentum != 0 ? std::vector<std::string>{"square_avg", "momentum_buffer"}
                             : std::vector<std::string>{"square_avg"};
    }
  };
  return std::visit(Visitor{}, spec);
}

OptimizerSpec WithGroup(OptimizerSpec spec, const ParameterGroupSpec* group) {
  if (group == nullptr) return spec;
  std::visit(
      [&](auto& o) {
        if (group->lr) o.lr = *group->lr;
        if constexpr (requires { o.weight_decay; }) {
          if (group->weight_decay) o.weight_decay = *group->weight_decay;
        }
      },
      spec);
  return spec;
}

bool SameOptions(const OptimizerSpec& a, const OptimizerSpec& b) {  // of one optimiser, by groups
  return std::visit(
      [&](const auto& o) {
        const auto& other = std::get<std::decay_t<decltype(o)>>(b);
        if constexpr (requires { o.weight_decay; }) {
          if (o.weight_decay != other.weight_decay) return false;
        }
        return o.lr == other.lr;
      },
      a);
}

template <typename T>
struct Ranges {
  T* values;
  T* gradients;
  T* state[2];

  Ranges From(int64_t first) const {
    return {values + first,
            gradients + first,
            {state[0] == nullptr ? nullptr : state[0] + first,
             state[1] == nullptr ? nullptr : state[1] + first}};
  }
};

// Sum of squares in chunks of a fixed size, so that the bits do not depend on the number of threads.
template <typename T>
double SquaredLength(const T* values, int64_t n) {
  const int64_t chunks = (n + kElementsPerThread - 1) / kElementsPerThread;
  if (chunks <= 1) return kernels::SumOfSquares(values, n);
  std::vector<double> sums(static_cast<size_t>(chunks));
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = c * kElementsPerThread;
      sums[static_cast<size_t>(c)] =
          kernels::SumOfSquares(values + at, std::min(kElementsPerThread, n - at));
    }
  });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

// The squared lengths of a parameter (or a part of it) and of what its step goes along: LAMB's
// direction, which takes the gradient's place, or LARS's gradient.
template <typename T>
void Measure(const OptimizerSpec& spec, const Ranges<T>& r, int64_t n, int64_t step, double scale,
             double* norms) {
  norms[0] += SquaredLength(r.values, n);
  if (const auto* lamb = std::get_if<Lamb>(&spec)) {
    at::parallel_for(0, n, kElementsPerThread, [&](int64_t first, int64_t last) {
      const Ranges<T> part = r.From(first);
      kernels::LambDirection(part.values, part.gradients, part.state[0], part.state[1],
                             last - first, scale,
                             {.lr = 0,
                              .beta1 = lamb->beta1,
                              .beta2 = lamb->beta2,
                              .eps = lamb->eps,
                              .weight_decay = lamb->weight_decay,
                              .decoupled = true,
                              .step = step});
    });
    scale = 1;
  }
  norms[1] += SquaredLength(r.gradients, n) * scale * scale;
}

// LARS leaves parameters of one dimension (biases, norms) alone: their step is SGD's, as in the
// published recipes.
template <typename T>
void StepMeasured(const OptimizerSpec& spec, const Ranges<T>& r, int64_t n, int64_t dimensions,
                  const double* norms, int64_t step, double factor, double scale) {
  const double length = std::sqrt(norms[0]), along = std::sqrt(norms[1]);
  const auto* lamb = std::get_if<Lamb>(&spec);
  const auto* lars = std::get_if<Lars>(&spec);
  double trust = 1;
  if (lamb != nullptr && length > 0 && along > 0) trust = length / along;
  if (lars != nullptr && dimensions > 1) {
    const double pull = along + lars->weight_decay * length;
    if (length > 0 && pull > 0) trust = lars->trust * length / pull;
  }
  at::parallel_for(0, n, kElementsPerThread, [&](int64_t first, int64_t last) {
    const Ranges<T> part = r.From(first);
    if (lamb != nullptr) {
      kernels::Descend(part.values, part.gradients, last - first, lamb->lr * factor * trust);
      return;
    }
    // The ratio scales the decayed gradient before it enters the momentum.
    kernels::Sgd(part.values, part.gradients, part.state[0], last - first, scale * trust,
                 {.lr = lars->lr * factor,
                  .momentum = lars->momentum,
                  .dampening = 0,
                  .weight_decay = lars->weight_decay * trust,
                  .nesterov = lars->nesterov,
                  .first_step = step == 1});
  });
}

template <typename T>
void StepRange(const OptimizerSpec& spec, const Ranges<T>& r, int64_t first, int64_t last,
               int64_t step, double factor, double scale) {
  const int64_t n = last - first;
  const Ranges<T> part = r.From(first);
  T* p = part.values;
  T* g = part.gradients;
  T* s0 = part.state[0];
  T* s1 = part.state[1];
  if (const auto* sgd = std::get_if<Sgd>(&spec)) {
    kernels::Sgd(p, g, s0, n, scale,
                 {.lr = sgd->lr * factor,
                  .momentum = sgd->momentum,
                  .dampening = sgd->dampening,
                  .weight_decay = sgd->weight_decay,
                  .nesterov = sgd->nesterov,
                  .first_step = step == 1});
  } else if (const auto* adam = std::get_if<Adam>(&spec)) {
    kernels::Adam(p, g, s0, s1, n, scale,
                  {.lr = adam->lr * factor,
                   .beta1 = adam->beta1,
                   .beta2 = adam->beta2,
                   .eps = adam->eps,
                   .weight_decay = adam->weight_decay,
                   .decoupled = false,
                   .step = step});
  } else if (const auto* adamw = std::get_if<AdamW>(&spec)) {
    kernels::Adam(p, g, s0, s1, n, scale,
                  {.lr = adamw->lr * factor,
                   .beta1 = adamw->beta1,
                   .beta2 = adamw->beta2,
                   .eps = adamw->eps,
                   .weight_decay = adamw->weight_decay,
                   .decoupled = true,
                   .step = step});
  } else if (const auto* adagrad = std::get_if<Adagrad>(&spec)) {
    kernels::Adagrad(p, g, s0, n, scale,
                     {.lr = adagrad->lr * factor,
                      .lr_decay = adagrad->lr_decay,
                      .eps = adagrad->eps,
                      .weight_decay = adagrad->weight_decay,
                      .step = step});
  } else {
    const RmsProp& rmsprop = std::get<RmsProp>(spec);
    kernels::RmsProp(p, g, s0, s1, n, scale,
                     {.lr = rmsprop.lr * factor,
                      .alpha = rmsprop.alpha,
                      .eps = rmsprop.eps,
                      .weight_decay = rmsprop.weight_decay,
                      .momentum = rmsprop.momentum});
  }
}

}  // namespace

Optimizer::Optimizer(const OptimizerSpec& spec, const FlatParameters& parameters,
                     std::vector<FlatRange> ranges, const std::vector<ParameterGroupSpec>& groups,
                     const std::vector<std::string>& only, const std::string& name)
    : spec_(spec),
      parameters_(parameters),
      step_name_(name.empty() ? "step" : "step/" + name),
      ranges_(std::move(ranges)),
      state_names_(StateNames(spec)) {
  for (const FlatParameters::Parameter& p : parameters.parameters()) {
    mine_.push_back(only.empty() || std::any_of(only.begin(), only.end(), [&](const auto& pattern) {
                      return MatchesPattern(pattern, p.name);
                    }));
  }
  const auto* adagrad = std::get_if<Adagrad>(&spec);
  const double start = adagrad == nullptr ? 0.0 : adagrad->initial_accumulator;
  operators_ = !ranges_.empty() && !ranges_.front().values.is_cpu();
  for (const FlatRange& range : ranges_) {
    std::vector<at::Tensor> states;
    for (size_t s = 0; s < state_names_.size(); ++s)
      states.push_back(at::full_like(range.values, start));
    state_.push_back(std::move(states));
    AddSegments(range, groups);
  }
  if (needs_norms()) norms_.resize(2 * parameters.parameters().size());
  if (const auto* lbfgs = std::get_if<Lbfgs>(&spec)) lbfgs_.emplace(*lbfgs, ranges_, state_);
}

void Optimizer::AddSegments(const FlatRange& range, const std::vector<ParameterGroupSpec>& groups) {
  const int64_t end = range.values.numel();
  std::vector<Segment> segments;
  const bool all = std::find(mine_.begin(), mine_.end(), false) == mine_.end();
  if (groups.empty() && all && !needs_norms()) {
    segments.push_back({.last = end, .spec = spec_});
  } else {
    for (size_t i : parameters_.buckets()[range.bucket].parameters) {
      const FlatParameters::Parameter& p = parameters_.parameters()[i];
      const int64_t first = std::clamp<int64_t>(p.offset - range.first, 0, end);
      const int64_t last = std::clamp<int64_t>(p.offset + p.tensor.numel() - range.first, 0, end);
      if (first == last || !mine_[i]) continue;
      OptimizerSpec own = WithGroup(spec_, GroupOf(groups, p.name));
      if (!segments.empty() && all && !needs_norms() && SameOptions(segments.back().spec, own)) {
        segments.back().last = last;  // over the padding, which is zero and stays zero
      } else {
        segments.push_back({first, last, i, std::move(own)});
      }
    }
  }
  segments_.push_back(std::move(segments));
}

void Optimizer::BeginStep(double lr_factor) {
  ++step_;
  lr_factor_ = lr_factor;
  std::fill(norms_.begin(), norms_.end(), 0.0);
}

double Optimizer::learning_rate() const {
  return std::visit([](const auto& o) { return o.lr; }, spec_) * lr_factor_;
}

bool Optimizer::needs_norms() const {
  return std::holds_alternative<Lamb>(spec_) || std::holds_alternative<Lars>(spec_);
}

template <typename F>
void Optimizer::OnRange(size_t i, F f) {
  const FlatRange& range = ranges_[i];
  const auto run = [&]<typename T>(T*) {
    Ranges<T> ranges{
        range.values.data_ptr<T>(), range.gradients.data_ptr<T>(), {nullptr, nullptr}};
    for (size_t s = 0; s < state_names_.size(); ++s) ranges.state[s] = state_[i][s].data_ptr<T>();
    for (const Segment& segment : segments_[i]) f(ranges, segment);
  };
  if (range.values.scalar_type() == at::kFloat) {
    run(static_cast<float*>(nullptr));
  } else {
    run(static_cast<double*>(nullptr));
  }
}

void Optimizer::StepByOperators(size_t i, double gradient_scale) {
  const FlatRange& range = ranges_[i];
  for (const Segment& segment : segments_[i]) {
    const auto part = [&](const at::Tensor& flat) {
      return flat.narrow(0, segment.first, segment.last - segment.first);
    };
    DeviceRange on_device{.values = part(range.values),
                          .gradients = part(range.gradients),
                          .state = {},
                          .dimensions = parameters_.parameters()[segment.parameter].tensor.dim()};
    for (const at::Tensor& state : state_[i]) on_device.state.push_back(part(state));
    StepOnDevice(segment.spec, on_device, step_, lr_factor_, gradient_scale);
  }
}

void Optimizer::MeasureRange(size_t i, double gradient_scale) {
  if (operators_) return;  // measured with the step
  OnRange(i, [&](const auto& ranges, const Segment& segment) {
    Measure(segment.spec, ranges.From(segment.first), segment.last - segment.first, step_,
            gradient_scale, &norms_[2 * segment.parameter]);
  });
}

void Optimizer::StepRange(size_t i, double gradient_scale) {
  if (operators_) return StepByOperators(i, gradient_scale);
  OnRange(i, [&](const auto& ranges, const Segment& segment) {
    if (needs_norms()) {
      StepMeasured(segment.spec, ranges.From(segment.first), segment.last - segment.first,
                   parameters_.parameters()[segment.parameter].tensor.dim(),
                   &norms_[2 * segment.parameter], step_, lr_factor_, gradient_scale);
      return;
    }
    at::parallel_for(segment.first, segment.last, kElementsPerThread,
                     [&](int64_t first, int64_t last) {
                       itwin::worker::StepRange(segment.spec, ranges, first, last, step_,
                                                lr_factor_, gradient_scale);
                     });
  });
}

LbfgsMinimizer::Result Optimizer::Search(const LbfgsMinimizer::Evaluate& evaluate) {
  return lbfgs_->Step(learning_rate(), evaluate);
}

std::vector<StateSlice> Optimizer::Slices() const {
  std::vector<StateSlice> slices;
  for (size_t s = 0; s < state_names_.size(); ++s) {
    for (size_t i = 0; i < ranges_.size(); ++i)
      AppendSlices(parameters_, ranges_[i], state_[i][s], state_names_[s] + "/", &slices);
    if (std::find(mine_.begin(), mine_.end(), false) == mine_.end()) continue;
    std::set<std::string> names;
    for (size_t i = 0; i < mine_.size(); ++i) {
      if (mine_[i]) names.insert(state_names_[s] + "/" + parameters_.parameters()[i].name);
    }
    std::erase_if(slices, [&](const StateSlice& slice) {
      return slice.name.starts_with(state_names_[s] + "/") && !names.contains(slice.name);
    });
  }
  return slices;
}

NamedTensors Optimizer::WholeState() const {
  NamedTensors state = {
      {step_name_, at::full({1}, at::Scalar(step_), at::TensorOptions().dtype(at::kLong))}};
  if (lbfgs_) state.emplace_back(kLbfgsFigures, lbfgs_->figures());
  return state;
}

std::vector<at::Tensor> Optimizer::FlatState() const {
  std::vector<at::Tensor> flat;
  for (const auto& states : state_) flat.insert(flat.end(), states.begin(), states.end());
  return flat;
}

void Optimizer::LoadState(const NamedTensors& state, const Strategy* strategy) {
  ScatterSlices(state, strategy == nullptr ? Slices() : strategy->InWhole(Slices()), "the checkpoint's optimiser state");
  const auto whole = [&](const std::string& wanted) -> const at::Tensor& {
    for (const auto& [name, tensor] : state) {
      if (name == wanted) return tensor;
    }
    throw AppError("the checkpoint's optimiser state does not fit: " + wanted + " is missing");
  };
  step_ = whole(step_name_).item<int64_t>();
  if (lbfgs_) lbfgs_->SetFigures(whole(kLbfgsFigures));
}

std::string Optimizer::name() const {
  constexpr const char* kNames[] = {"sgd",     "adam", "adamw", "rmsprop",
                                      "adagrad", "lamb", "lars",  "lbfgs"};
  return kNames[spec_.index()];
}

double SumOfSquares(const std::vector<FlatRange>& ranges) {
  double sum = 0;
  at::Tensor on_device;  // waited for once
  for (const FlatRange& range : ranges) {
    if (!range.gradients.is_cpu()) {
      const at::Tensor squares = range.gradients.norm().to(at::kDouble).square();
      on_device = on_device.defined() ? on_device.add(squares) : squares;
      continue;
    }
    const int64_t n = range.gradients.numel();
    sum += range.gradients.scalar_type() == at::kFloat
               ? kernels::SumOfSquares(range.gradients.data_ptr<float>(), n)
               : kernels::SumOfSquares(range.gradients.data_ptr<double>(), n);
  }
  return on_device.defined() ? sum + on_device.item<double>() : sum;
}

bool AllFinite(const std::vector<FlatRange>& ranges) {
  for (const FlatRange& range : ranges) {
    if (!range.values.is_cpu()) {
      if (!range.values.isfinite().all().item<bool>()) return false;
      continue;
    }
    const int64_t n = range.values.numel();
    const bool finite = range.values.scalar_type() == at::kFloat
                            ? kernels::AllFinite(range.values.data_ptr<float>(), n)
                            : kernels::AllFinite(range.values.data_ptr<double>(), n);
    if (!finite) return false;
  }
  return true;
}

}  // namespace itwin::worker

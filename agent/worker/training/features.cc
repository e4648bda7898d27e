#include "agent/worker/training/features.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <string_view>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr char kState[] = "features/", kBest[] = "best/";

constexpr std::string_view kValidation = "validation/";
constexpr char kPlateau[] = "train.schedule.plateau.metric";
constexpr char kStopping[] = "train.early_stopping.metric";
constexpr char kBestMetric[] = "train.best.metric";

WorkerError NoSuchMetric(const std::string& field, const std::string& metric, const std::vector<std::string>& names) {
  std::vector<std::string> short_names;  // what all begin with would make all alike
  for (const std::string& name : names) short_names.push_back(name.substr(kValidation.size()));
  const std::string nearest = NearestName(metric.substr(kValidation.size()), short_names);
  return UserError(field + ": the evaluation has no " + metric +
                   (nearest.empty() ? "" : "; did you mean \"" + std::string(kValidation) + nearest + "\"?") + " (it has " +
                   JoinNames(names) + ")");
}

double ValueOf(const std::map<std::string, double>& metrics, const std::string& field,
               const std::string& metric) {
  if (const auto found = metrics.find(metric); found != metrics.end()) return found->second;
  std::vector<std::string> names;
  for (const auto& [name, value] : metrics) {
    if (name.starts_with(kValidation)) names.push_back(name);
  }
  throw NoSuchMetric(field, metric, names);
}

// Of the state of a watch in a checkpoint: another metric's, or another direction's, is of no use.
std::string WatchName(const std::string& what, const std::string& metric, bool maximize) {
  return what + (maximize ? "/max/" : "/min/") + metric;
}

at::Tensor HostCopy(const at::Tensor& tensor) {
  return tensor.detach().to(tensor.options().device(at::kCPU).requires_grad(false), /*non_blocking=*/false, /*copy=*/true);
}

std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.5g", value);
  return text;
}

}  // namespace

Features::Features(const TrainSpec& spec, const RunLength& run, bool has_validation,
                   const std::string& strategy, FlatParameters& parameters)
    : spec_(spec), run_(run) {
  const auto watched = [&](const std::string& field) {
    if (has_validation) return;
    throw UserError(field + ": needs a validation split; give train.data.split.validation or validation_fraction");
  };
  if (const auto* plateau = std::get_if<PlateauSchedule>(&spec.schedule.kind)) {
    watched("train.schedule.plateau");
    plateau_.emplace(*plateau);
  }
  if (const auto& s = spec.early_stopping) {
    watched("train.early_stopping");
    stopping_.emplace(s->metric, s->maximize, s->min_delta);
  }
  if (const auto& b = spec.best) {
    watched("train.best");
    watch_best_.emplace(b->metric, b->maximize);
  }
  if (spec.validate_every_steps > 0) watched("train.validate_every_steps");
  if (spec.ema) {
    if (strategy != "single" && strategy != "ddp" && strategy != "horovod") {
      throw UserError("train.ema: works with the strategies single, ddp and horovod, where each rank has all weights; this "
                      "job's is " + strategy);
    }
    average_.emplace(parameters, *spec.ema);
  }
  if (spec.precision == Precision::kFloat16) {
    if (strategy == "local_sgd") {
      throw UserError("train.precision: fp16 needs ranks that agree in every step on the loss scale, which they do not with "
                      "local_sgd; use bf16");
    }
    scaler_.emplace(spec.loss_scale);
  }
}

Features::~Features() = default;

double Features::RateFactor(int64_t step) const {
  const double factor = ScheduleFactor(spec_.schedule, run_, step);
  return plateau_ ? factor * plateau_->state().factor : factor;
}

void Features::RequireMetrics(const std::vector<std::string>& names) const {
  const auto require = [&](const char* field, const std::string& metric) {
    if (std::find(names.begin(), names.end(), metric) == names.end()) throw NoSuchMetric(field, metric, names);
  };
  if (plateau_) require(kPlateau, std::get<PlateauSchedule>(spec_.schedule.kind).metric);
  if (watch_best_) require(kBestMetric, watch_best_->metric());
  if (stopping_) require(kStopping, stopping_->metric());
}

std::vector<std::string> Features::Observe(const std::map<std::string, double>& metrics, int64_t step,
                                           Model& model, bool keep_weights) {
  std::vector<std::string> lines;
  std::set<std::string> not_finite;
  const auto value_of = [&](const char* field, const std::string& metric) {
    const double value = ValueOf(metrics, field, metric);
    if (!std::isfinite(value) && not_finite.insert(metric).second) {
      lines.push_back("step " + std::to_string(step) + ": " + metric + " is not finite (" + Number(value) +
                      "), which counts as no improvement");
    }
    return value;
  };
  if (plateau_) {
    const std::string& metric = std::get<PlateauSchedule>(spec_.schedule.kind).metric;
    if (plateau_->Observe(value_of(kPlateau, metric))) {
      lines.push_back("step " + std::to_string(step) + ": " + metric + " has stopped to improve; learning rate × " +
                      Number(plateau_->state().factor) + " from here");
    }
  }
  if (watch_best_) {
    const double value = value_of(kBestMetric, watch_best_->metric());
    if (watch_best_->Observe(value, step) && keep_weights) {
      best_.clear();
      for (const auto& [name, tensor] : model.parameters()) best_.emplace_back(name, HostCopy(tensor));
      for (const auto& [name, tensor] : model.buffers()) best_.emplace_back(name, HostCopy(tensor));
    }
  }
  if (stopping_) {
    const double value = value_of(kStopping, stopping_->metric());
    const MetricWatch::State& state = stopping_->state();
    if (!stopping_->Observe(value, step) && state.bad >= spec_.early_stopping->patience && !stopped_) {
      stopped_ = true;
      const std::string evaluations = " in " + std::to_string(state.bad) + " evaluations";
      lines.push_back("stopped early at step " + std::to_string(step) + ": " + stopping_->metric() +
                      (state.best_step < 0 ? " has not been finite" + evaluations
                                           : " has not improved" + evaluations + "; the best was " + Number(state.best) +
                                                 " at step " + std::to_string(state.best_step)));
    }
  }
  return lines;
}

int64_t Features::ExportBest(Model& model, Communicator& communicator) {
  if (!watch_best_ || !spec_.best->export_best || watch_best_->state().best_step < 0) return -1;
  int64_t there = best_.empty() ? 0 : 1;
  communicator.Broadcast(BufferOf(std::span(&there, 1)), 0)->Wait();
  if (there == 0) return -1;
  const at::NoGradGuard no_grad;
  size_t i = 0;
  const auto put = [&](const std::vector<std::pair<std::string, at::Tensor>>& targets) {
    for (const auto& [name, target] : targets) {
      const at::Tensor value = best_.empty() ? at::empty(target.sizes(), target.options().device(at::kCPU).requires_grad(false)) : best_[i].second.contiguous();
      ++i;
      communicator.Broadcast({value.data_ptr(), static_cast<int64_t>(value.nbytes()), ElementType::kByte}, 0)->Wait();
      target.detach().copy_(value);
    }
  };
  put(model.parameters());
  put(model.buffers());
  best_.clear();
  return watch_best_->state().best_step;
}

NamedTensors Features::State() const {
  NamedTensors state;
  const auto add = [&](const std::string& name, const std::vector<double>& values) {
    state.emplace_back(kState + name, at::tensor(values, at::kDouble));
  };
  const auto whole = [](int64_t n) { return static_cast<double>(n); };
  if (plateau_) {
    const Plateau::State& p = plateau_->state();
    add("plateau", {p.factor, p.best, whole(p.bad), whole(p.cooldown)});
  }
  if (stopping_) {
    const MetricWatch::State& s = stopping_->state();
    add(WatchName("early_stopping", stopping_->metric(), spec_.early_stopping->maximize),
        {s.best, whole(s.best_step), whole(s.bad), stopped_ ? 1.0 : 0.0});
  }
  if (watch_best_) {
    const MetricWatch::State& s = watch_best_->state();
    add(WatchName("best", watch_best_->metric(), spec_.best->maximize), {s.best, whole(s.best_step), whole(s.bad)});
    for (const auto& [name, tensor] : best_) state.emplace_back(kBest + name, tensor);
  }
  if (scaler_) {
    const LossScaler::State& s = scaler_->state();
    add("loss_scale", {s.scale, whole(s.good_steps), whole(s.hysteresis), whole(s.skipped)});
  }
  if (average_) {
    for (auto& entry : average_->State()) state.push_back(std::move(entry));
  }
  return state;
}

void Features::LoadState(const NamedTensors& state) {
  const auto find = [&](const std::string& name, size_t count) -> std::optional<std::vector<double>> {
    for (const auto& [entry, tensor] : state) {
      if (entry != kState + name) continue;
      if (tensor.scalar_type() == at::kDouble && tensor.numel() == static_cast<int64_t>(count)) {
        const at::Tensor flat = tensor.contiguous();
        return std::vector<double>(flat.data_ptr<double>(), flat.data_ptr<double>() + count);
      }
    }
    return std::nullopt;
  };
  const auto values = [&](const std::string& name, size_t count) {
    if (const auto found = find(name, count)) return *found;
    throw AppError("the checkpoint does not fit the job: it has no state of " + name);
  };
  const auto whole = [](double n) { return static_cast<int64_t>(n); };
  if (plateau_) {
    const auto v = values("plateau", 4);
    plateau_->Restore({.factor = v[0], .best = v[1], .bad = whole(v[2]), .cooldown = whole(v[3])});
  }
  const auto restore = [&](MetricWatch& watch, const std::vector<double>& v) {
    watch.Restore({.best = v[0], .best_step = whole(v[1]), .bad = whole(v[2])});
  };
  if (const auto& s = spec_.early_stopping) {
    if (const auto v = find(WatchName("early_stopping", s->metric, s->maximize), 4)) {
      restore(*stopping_, *v);
      stopped_ = (*v)[3] != 0 && stopping_->state().bad >= s->patience;  // with more patience it goes on
    }
  }
  const auto best = watch_best_ ? find(WatchName("best", spec_.best->metric, spec_.best->maximize), 3) : std::nullopt;
  if (best) {
    restore(*watch_best_, *best);
    best_.clear();
    for (const auto& [name, tensor] : state) {
      if (name.starts_with(kBest)) best_.emplace_back(name.substr(sizeof(kBest) - 1), tensor.clone());
    }
  }
  if (scaler_) {
    const auto v = values("loss_scale", 4);
    scaler_->Restore({.scale = v[0], .good_steps = whole(v[1]), .hysteresis = whole(v[2]), .skipped = whole(v[3])});
  }
  if (average_) average_->LoadState(state);
}

}  // namespace itwin::worker

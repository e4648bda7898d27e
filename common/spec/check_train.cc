#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/spec/checks.h"
#include "common/spec/validate.h"

// `train`: the model, its optimizer, the strategy, and what goes with what.
namespace itwin {
namespace {

constexpr int64_t kMaxEpochs = 1'000'000'000;
constexpr int kMaxPairs = 1'000;  // of lbfgs; each takes twice the model's memory
constexpr int64_t kMaxParts = 1'000'000;  // of a step
constexpr int64_t kDefaultBatch = 32;
constexpr double kDefaultLossScale = 65536;
constexpr double kDefaultHidden = 128;  // of an mlp

bool SplitsModel(const std::string& strategy) {
  return strategy == "tensor" || strategy == "pipeline" || strategy == "mesh";
}

class TrainChecks : SpecChecks {
 public:
  explicit TrainChecks(Problems* problems) : SpecChecks(problems) {}

  void Check(const v1::TrainSpec& train, const v1::Resources& resources) {
    switch (train.model().source_case()) {
      case v1::Model::kTorchscript:
      case v1::Model::kArchive: break;
      case v1::Model::kBuiltin: OneOf("train.model.builtin", train.model().builtin(), BuiltinModels()); break;
      case v1::Model::SOURCE_NOT_SET:
        Report("train.model", "is missing; give {archive: <file>}, {torchscript: <file>} or {builtin: <name>}");
        break;
    }
    if (train.model().source_case() == v1::Model::kTorchscript && train.model().options().fields_size() > 0) {
      Report("train.model.options", "belongs to built-in models; a TorchScript module is complete as it is");
    }
    if (train.model().source_case() == v1::Model::kArchive && train.model().options().fields_size() > 0) {
      Report("train.model.options", "belongs to built-in models; an archive is complete as it is");
    }
    if (train.model().source_case() == v1::Model::kBuiltin) CheckModelOptions(train.model(), &problems_);
    CheckData(train.data(), &problems_);
    CheckLossAndMetrics(train);
    CheckOptimizer(train.optimizer(), train.has_optimizer(), "train.optimizer");
    Range("train.batch", train.batch(), 0, std::numeric_limits<int32_t>::max());
    Range("train.epochs", train.epochs(), 0, kMaxEpochs);
    Range("train.steps", train.steps(), 0, std::numeric_limits<int64_t>::max());
    const int64_t ranks = std::max<int64_t>(1, resources.nodes()) * std::max<int64_t>(1, resources.ranks_per_node());
    if (!train.strategy().empty()) {
      OneOf("train.strategy", train.strategy(), StrategyNames());
      if (train.strategy() == "single" && ranks > 1) {
        Report("train.strategy", absl::StrCat("'single' uses one rank but `resources` asks for ", ranks,
                                              "; use 'ddp' or one rank"));
      }
    }
    if (train.batch() > 0 && ranks > train.batch()) {
      Report("train.batch", absl::StrCat(train.batch(), " samples cannot be shared by ", ranks,
                                         " ranks; use a batch of at least one sample per rank"));
    }
    CheckStrategySettings(train);
    CheckFeaturesOfStrategy(train, ranks);
    CheckLbfgs(train);
    CheckMesh(train, ranks);
    CheckGpu(train, resources, ranks);
    AtLeast("train.ddp.bucket_mb", train.ddp().bucket_mb(), 0);
    AtLeast("train.ddp.first_bucket_mb", train.ddp().first_bucket_mb(), 0);
    Range("train.validate_every", train.validate_every(), 0, kMaxEpochs);
    Range("train.checkpoint.every_epochs", train.checkpoint().every_epochs(), 0, kMaxEpochs);
    Range("train.checkpoint.keep", train.checkpoint().keep(), 0, 10'000);
    AtLeast("train.clip_norm", train.clip_norm(), 0);
    Range("train.accumulate", train.accumulate(), 0, kMaxParts);
    if (const int64_t batch = train.batch() > 0 ? train.batch() : kDefaultBatch; train.accumulate() > batch) {
      Report("train.accumulate", absl::StrCat(train.accumulate(), " parts are more than the ", batch,
                                              " samples of the batch; the parts beyond would be empty"));
    }
    if (train.has_check_every()) Range("train.check_every", train.check_every(), 0, kMaxEpochs);
    AtLeast("train.clip_value", train.clip_value(), 0);
    Range("train.top_k", train.top_k(), 0, kMaxElements);
    if (train.has_schedule()) CheckSchedule(train.schedule());
    CheckPrecision(train);
    if (train.has_ema() && train.ema().has_decay() && !(train.ema().decay() > 0 && train.ema().decay() < 1)) {
      Report("train.ema.decay",
             absl::StrCat(NumberText(train.ema().decay()), " is out of range; use a number above 0 and below 1"));
    }
    if (train.has_early_stopping()) {
      const v1::EarlyStopping& stopping = train.early_stopping();
      if (!stopping.metric().empty()) CheckMetricPath("train.early_stopping.metric", stopping.metric());
      CheckDirection("train.early_stopping.direction", stopping.direction());
      Range("train.early_stopping.patience", stopping.patience(), 0, kMaxEpochs);
      AtLeast("train.early_stopping.min_delta", stopping.min_delta(), 0);
    }
    if (train.has_best()) {
      if (!train.best().metric().empty()) CheckMetricPath("train.best.metric", train.best().metric());
      CheckDirection("train.best.direction", train.best().direction());
    }
    CheckWatched(train);
    Range("train.validate_every_steps", train.validate_every_steps(), 0, std::numeric_limits<int64_t>::max());
    CheckParameterGroups(train);
    CheckPhases(train);
    CheckLossOptions(train);
    CheckPredict(train);
    CheckProfile(train.profile());
  }

 private:
  // As the worker's Loss (agent/worker/model/loss.cc); what a module brings itself only the worker sees.
  void CheckLossAndMetrics(const v1::TrainSpec& train) {
    const std::string& loss = train.loss();
    if (!loss.empty()) OneOf("train.loss", loss, LossNames());
    if (loss.empty() && train.model().source_case() == v1::Model::kBuiltin) {
      Report("train.loss", absl::StrCat("is missing; a built-in model brings none of its own; use one of ",
                                        absl::StrJoin(LossNames(), ", ")));
    }
    const std::set<std::string> of_classes = {"cross_entropy", "nll", "focal", "dice", "bce_logits"};
    const std::set<std::string> class_metrics = {"accuracy", "top_k", "confusion", "iou"};
    const bool classes = of_classes.contains(loss);
    const auto& losses = LossNames();
    const bool known_loss = std::find(losses.begin(), losses.end(), loss) != losses.end();
    if (loss == "kl_div" && train.metrics_size() > 0) {
      return Report("train.metrics",
                    "are of numbers or classes; the loss kl_div compares distributions and has no metric beside it");
    }
    std::set<std::string> seen;
    for (int i = 0; i < train.metrics_size(); ++i) {
      const std::string at = absl::StrCat("train.metrics[", i, "]");
      const std::string& metric = train.metrics(i);
      OneOf(at, metric, MetricNames());
      if (!seen.insert(metric).second) Report(at, absl::StrCat(Quoted(metric), " is given twice"));
      const auto& names = MetricNames();
      if (!known_loss || std::find(names.begin(), names.end(), metric) == names.end()) continue;
      if (class_metrics.contains(metric) != classes) {
        Report(at, absl::StrCat(Quoted(metric), " cannot be measured with the loss ", loss,
                                classes ? ", whose predictions are scores of classes; use accuracy, top_k, confusion or iou"
                                        : ", whose target has no classes; use mse, rmse, mae, bias or r2"));
      } else if (metric == "top_k" && (loss == "bce_logits" || loss == "dice")) {
        Report(at, absl::StrCat(Quoted(metric), " cannot be measured with the loss ", loss, "; use accuracy"));
      }
    }
  }

  // What the ranks' way of sharing the work cannot do (agent/worker/training/features.cc, training_loop.cc). One rank
  // runs single; for strategies that split the model see CheckMesh.
  void CheckFeaturesOfStrategy(const v1::TrainSpec& train, int64_t ranks) {
    if (ranks == 1 || SplitsModel(train.strategy())) return;
    const bool local = train.local_sgd().every() > 1;
    if (train.has_ema() && (local || absl::StartsWith(train.strategy(), "zero"))) {
      Report("train.ema",
             absl::StrCat("works with the strategies single, ddp and horovod, where each rank has all weights; this job's is ",
                          local ? "ddp with local_sgd" : train.strategy()));
    }
    if (local && train.precision() == "fp16") {
      Report("train.precision", "fp16 needs ranks that agree in every step on the loss scale, which they do not with local_sgd; "
                                "use bf16");
    }
    if (local && train.phases_size() > 0) {
      Report("train.phases", "work with the strategies single, ddp, horovod, zero1 and zero2, not with ddp with local_sgd");
    }
  }

  void CheckPrecision(const v1::TrainSpec& train) {
    if (!train.precision().empty()) OneOf("train.precision", train.precision(), {"fp32", "bf16", "fp16"});
    if (!train.has_loss_scale()) return;
    if (train.precision() != "fp16") Report("train.loss_scale", "belongs to precision fp16; remove it");
    const v1::LossScale& scale = train.loss_scale();
    if (scale.has_smallest()) Above("train.loss_scale.smallest", scale.smallest(), 0);
    AtLeast("train.loss_scale.initial", scale.has_initial() ? scale.initial() : kDefaultLossScale,
            scale.has_smallest() ? scale.smallest() : 1);
    if (scale.has_window()) Range("train.loss_scale.window", scale.window(), 1, kMaxEpochs);
    if (scale.has_hysteresis()) Range("train.loss_scale.hysteresis", scale.hysteresis(), 1, kMaxEpochs);
  }

  // What watches evaluations needs some samples to evaluate on.
  void CheckWatched(const v1::TrainSpec& train) {
    const v1::Split& split = train.data().split();
    if (!split.validation().empty() || split.validation_fraction() > 0) return;
    const std::pair<const char*, bool> watching[] = {
        {"train.schedule.plateau", train.schedule().has_plateau()},
        {"train.early_stopping", train.has_early_stopping()},
        {"train.best", train.has_best()},
        {"train.validate_every_steps", train.validate_every_steps() > 0}};
    for (const auto& [field, given] : watching) {
      if (given) Report(field, "needs a validation split; give train.data.split.validation or validation_fraction");
    }
  }

  void CheckDirection(const std::string& at, const std::string& direction) {
    if (!direction.empty()) OneOf(at, direction, {"min", "max"});
  }

  void CheckSchedule(const v1::Schedule& schedule) {
    const std::string at = "train.schedule";
    constexpr int64_t kMaxSteps = std::numeric_limits<int64_t>::max();
    if (!schedule.unit().empty()) OneOf(at + ".unit", schedule.unit(), {"step", "epoch"});
    Range(at + ".warmup_steps", schedule.warmup_steps(), 0, kMaxSteps);
    if (schedule.has_warmup_start()) AtLeast(at + ".warmup_start", schedule.warmup_start(), 0);
    switch (schedule.kind_case()) {
      case v1::Schedule::kConstant: return;
      case v1::Schedule::kLinear:
        if (schedule.linear().has_start()) AtLeast(at + ".linear.start", schedule.linear().start(), 0);
        if (schedule.linear().has_end()) AtLeast(at + ".linear.end", schedule.linear().end(), 0);
        return Range(at + ".linear.length", schedule.linear().length(), 0, kMaxSteps);
      case v1::Schedule::kStep:
        if (schedule.step().has_gamma()) Above(at + ".step.gamma", schedule.step().gamma(), 0);
        return Range(at + ".step.every", schedule.step().every(), 1, kMaxSteps);
      case v1::Schedule::kMultiStep: {
        const v1::MultiStepSchedule& steps = schedule.multi_step();
        if (steps.has_gamma()) Above(at + ".multi_step.gamma", steps.gamma(), 0);
        if (steps.milestones_size() == 0) Report(at + ".multi_step.milestones", "is missing; such as [30, 60]");
        if (steps.milestones_size() > kMaxListedNames) Report(at + ".multi_step.milestones", "has too many entries");
        for (int i = 0; i < std::min(steps.milestones_size(), kMaxListedNames); ++i) {
          if (steps.milestones(i) > (i == 0 ? 0 : steps.milestones(i - 1))) continue;
          Report(absl::StrCat(at, ".multi_step.milestones[", i, "]"),
                 absl::StrCat(steps.milestones(i), " does not rise; give rising numbers from 1"));
        }
        return;
      }
      case v1::Schedule::kExponential: return Above(at + ".exponential.gamma", schedule.exponential().gamma(), 0);
      case v1::Schedule::kCosine:
        AtLeast(at + ".cosine.min_factor", schedule.cosine().min_factor(), 0);
        return Range(at + ".cosine.length", schedule.cosine().length(), 0, kMaxSteps);
      case v1::Schedule::kOneCycle: {
        const v1::OneCycleSchedule& cycle = schedule.one_cycle();
        Range(at + ".one_cycle.length", cycle.length(), 0, kMaxSteps);
        if (cycle.has_rise() && !(cycle.rise() > 0 && cycle.rise() < 1)) {
          Report(at + ".one_cycle.rise",
                 absl::StrCat(NumberText(cycle.rise()), " is out of range; use a number above 0 and below 1"));
        }
        if (cycle.has_initial_divisor()) Above(at + ".one_cycle.initial_divisor", cycle.initial_divisor(), 0);
        if (cycle.has_final_divisor()) Above(at + ".one_cycle.final_divisor", cycle.final_divisor(), 0);
        if (schedule.warmup_steps() > 0) {
          Report(at + ".warmup_steps", "does not go with one_cycle, which has its own rise; remove it");
        }
        return;
      }
      case v1::Schedule::kPolynomial:
        if (schedule.polynomial().has_power()) Above(at + ".polynomial.power", schedule.polynomial().power(), 0);
        AtLeast(at + ".polynomial.min_factor", schedule.polynomial().min_factor(), 0);
        return Range(at + ".polynomial.length", schedule.polynomial().length(), 0, kMaxSteps);
      case v1::Schedule::kPlateau: {
        const v1::PlateauSchedule& plateau = schedule.plateau();
        if (plateau.has_factor() && !(plateau.factor() > 0 && plateau.factor() < 1)) {
          Report(at + ".plateau.factor",
                 absl::StrCat(NumberText(plateau.factor()), " is out of range; use a number above 0 and below 1"));
        }
        if (plateau.has_patience()) Range(at + ".plateau.patience", plateau.patience(), 0, kMaxEpochs);
        if (plateau.has_threshold()) AtLeast(at + ".plateau.threshold", plateau.threshold(), 0);
        Range(at + ".plateau.cooldown", plateau.cooldown(), 0, kMaxEpochs);
        AtLeast(at + ".plateau.min_factor", plateau.min_factor(), 0);
        if (!plateau.metric().empty()) CheckMetricPath(at + ".plateau.metric", plateau.metric());
        return CheckDirection(at + ".plateau.direction", plateau.direction());
      }
      case v1::Schedule::KIND_NOT_SET: return;  // a warm-up alone
    }
  }

  // "validation/rmse": which evaluation and which of its values.
  void CheckMetricPath(const std::string& at, const std::string& metric) {
    if (absl::StartsWith(metric, "validation/") && metric.size() > std::string("validation/").size()) return;
    Report(at, absl::StrCat(Quoted(metric), " is no metric of the evaluation; write validation/<name>, such as validation/loss"));
  }

  void CheckParameterGroups(const v1::TrainSpec& train) {
    if (train.parameter_groups_size() > kMaxListedNames) return Report("train.parameter_groups", "has too many entries");
    for (int i = 0; i < train.parameter_groups_size(); ++i) {
      const v1::ParameterGroup& group = train.parameter_groups(i);
      const std::string at = absl::StrCat("train.parameter_groups[", i, "]");
      if (group.match_size() == 0) Report(at + ".match", "is missing; name parameters, such as [\"encoder.*\"]");
      Names(at + ".match", group.match());
      if (group.has_lr()) AtLeast(at + ".lr", group.lr(), 0);
      if (group.has_weight_decay()) AtLeast(at + ".weight_decay", group.weight_decay(), 0);
      if (group.freeze() && (group.has_lr() || group.has_weight_decay())) {
        Report(at + ".freeze", "leaves nothing to train, so lr and weight_decay have no meaning; remove them");
      }
    }
  }

  void CheckPhases(const v1::TrainSpec& train) {
    if (train.phases_size() == 0) return;
    if (train.phases_size() > kMaxListedNames) return Report("train.phases", "has too many entries");
    if (train.has_optimizer()) Report("train.phases", "have an optimizer each; leave `optimizer` out");
    if (!train.loss().empty()) Report("train.phases", "have methods that bring their own loss; leave `loss` out");
    if (train.model().source_case() == v1::Model::kBuiltin) {
      Report("train.phases", "are for TorchScript modules with a method each, not for built-in models");
    }
    const std::set<std::string> able = {"", "single", "ddp", "horovod", "zero1", "zero2"};
    if (!able.contains(train.strategy())) {
      Report("train.phases", absl::StrCat("work with the strategies single, ddp, horovod, zero1 and zero2, not with ",
                                          train.strategy()));
    }
    std::set<std::string> names;
    for (int i = 0; i < train.phases_size(); ++i) {
      const v1::Phase& phase = train.phases(i);
      const std::string at = absl::StrCat("train.phases[", i, "]");
      if (phase.name().empty()) Report(at + ".name", "is missing");
      if (!names.insert(phase.name()).second) Report(at + ".name", absl::StrCat(Quoted(phase.name()), " is given twice"));
      if (phase.match_size() == 0) Report(at + ".match", "is missing; name its parameters, such as [\"generator\"]");
      Names(at + ".match", phase.match());
      Range(at + ".repeats", phase.repeats(), 0, 1'000'000);
      CheckOptimizer(phase.optimizer(), phase.has_optimizer(), at + ".optimizer");
    }
  }

  void CheckLossOptions(const v1::TrainSpec& train) {
    const v1::LossOptions& options = train.loss_options();
    const std::string at = "train.loss_options";
    const auto belongs = [&](const char* key, bool given, const std::vector<std::string>& losses) {
      if (!given || std::find(losses.begin(), losses.end(), train.loss()) != losses.end()) return;
      Report(absl::StrCat(at, ".", key),
             absl::StrCat("belongs to the loss ", absl::StrJoin(losses, ", "), train.loss().empty() ? "" : "; this job's is ",
                          train.loss()));
    };
    belongs("label_smoothing", options.label_smoothing() != 0, {"cross_entropy"});
    belongs("class_weights", options.class_weights_size() > 0, {"cross_entropy", "nll", "focal"});
    belongs("delta", options.has_delta(), {"huber"});
    belongs("beta", options.has_beta(), {"smooth_l1"});
    belongs("gamma", options.has_gamma(), {"focal"});
    belongs("quantiles", options.quantiles_size() > 0, {"quantile"});
    belongs("smooth", options.has_smooth(), {"dice"});
    belongs("members", options.members() != 0, {"crps_ensemble"});
    if (options.members() != 0) Range(at + ".members", options.members(), 2, kMaxListedNames);
    Fraction(at + ".label_smoothing", options.label_smoothing());
    if (options.has_delta()) Above(at + ".delta", options.delta(), 0);
    if (options.has_beta()) Above(at + ".beta", options.beta(), 0);
    if (options.has_gamma()) AtLeast(at + ".gamma", options.gamma(), 0);
    if (options.has_smooth()) AtLeast(at + ".smooth", options.smooth(), 0);
    for (int i = 0; i < std::min(options.class_weights_size(), kMaxListedNames); ++i) {
      AtLeast(absl::StrCat(at, ".class_weights[", i, "]"), options.class_weights(i), 0);
    }
    for (int i = 0; i < std::min(options.quantiles_size(), kMaxListedNames); ++i) {
      const double lower = i == 0 ? 0 : options.quantiles(i - 1);
      if (!(options.quantiles(i) > lower && options.quantiles(i) < 1)) {
        Report(absl::StrCat(at, ".quantiles[", i, "]"),
               absl::StrCat(NumberText(options.quantiles(i)), " is out of range; give rising numbers between 0 and 1"));
      }
    }
    if (train.loss() == "quantile" && options.quantiles_size() == 0) {
      Report(at + ".quantiles", "is missing; the loss quantile needs them, as in [0.1, 0.5, 0.9]");
    }
  }

  // A setting of a strategy that is not the job's would do nothing.
  void CheckStrategySettings(const v1::TrainSpec& train) {
    const std::string& strategy = train.strategy();
    const auto belongs = [&](bool given, absl::string_view key, absl::string_view to, bool fits) {
      if (given && !fits) {
        Report(absl::StrCat("train.", key), absl::StrCat("belongs to strategy ", to, ", but the strategy is ",
                                                         strategy.empty() ? "ddp" : strategy, "; remove one"));
      }
    };
    const bool ddp = strategy.empty() || strategy == "ddp" || strategy == "single";
    belongs(train.has_ddp(), "ddp", "ddp", ddp);
    belongs(train.has_local_sgd(), "local_sgd", "ddp", ddp);
    belongs(train.has_horovod(), "horovod", "horovod", strategy == "horovod");
    belongs(train.has_zero(), "zero", "zero1, zero2 or zero3", absl::StartsWith(strategy, "zero"));
    if (train.has_local_sgd()) {
      Range("train.local_sgd.every", train.local_sgd().every(), 1, kMaxEpochs);
      if (train.local_sgd().every() > 1 && !train.ddp().compression().empty()) {
        Report("train.ddp.compression", "compresses gradients, which local_sgd does not exchange; remove one");
      }
    }
    if (!train.ddp().compression().empty())
      OneOf("train.ddp.compression", train.ddp().compression(), {"none", "fp16", "bf16"});
    AtLeast("train.horovod.fusion_mb", train.horovod().fusion_mb(), 0);
    AtLeast("train.horovod.cycle_ms", train.horovod().cycle_ms(), 0);
    AtLeast("train.zero.bucket_mb", train.zero().bucket_mb(), 0);
  }

  // LBFGS needs the whole gradient of one unchanging loss on every rank.
  void CheckLbfgs(const v1::TrainSpec& train) {
    for (int i = 0; i < train.phases_size(); ++i) {
      if (!train.phases(i).optimizer().has_lbfgs()) continue;
      Report(absl::StrCat("train.phases[", i, "].optimizer"), "is lbfgs, which trains all parameters by itself; use another");
    }
    if (!train.optimizer().has_lbfgs()) return;
    const auto refuse = [&](bool given, absl::string_view key, absl::string_view why) {
      if (given) Report(absl::StrCat("train.", key), absl::StrCat("does not go with the optimizer lbfgs, ", why));
    };
    refuse(!train.strategy().empty() && train.strategy() != "single" && train.strategy() != "ddp", "strategy",
           "which works with single and ddp");
    refuse(train.local_sgd().every() > 1, "local_sgd", "whose ranks must see the same gradient; remove it");
    refuse(train.precision() == "fp16", "precision", "whose search has no step to skip; use fp32 or bf16");
    refuse(train.clip_norm() > 0, "clip_norm", "which needs the gradient as it is; remove it");
    refuse(train.clip_value() > 0, "clip_value", "which needs the gradient as it is; remove it");
    for (const v1::ParameterGroup& group : train.parameter_groups()) {
      refuse(!group.freeze(), "parameter_groups", "which has one rate for all; groups can only freeze");
    }
  }

  // What works on GPUs; the worker knows the same (agent/worker/device/device.cc).
  void CheckGpu(const v1::TrainSpec& train, const v1::Resources& resources, int64_t ranks) {
    if (resources.gpus_per_node() <= 0) {
      if (train.has_gpu()) Report("train.gpu", "is for jobs with GPUs; set resources.gpus_per_node, or remove it");
      return;
    }
    if (resources.ranks_per_node() > resources.gpus_per_node()) {
      Report("resources.ranks_per_node", absl::StrCat(resources.ranks_per_node(), " ranks cannot share the ", resources.gpus_per_node(),
                                                      " of gpus_per_node; each rank of a training job needs a GPU of its own"));
    }
    const std::string strategy = ranks == 1 ? "single" : train.strategy().empty() ? "ddp" : train.strategy();
    if (train.optimizer().has_lbfgs()) Report("train.optimizer", "is lbfgs, which runs on processors only; use adam, or leave resources.gpus_per_node out");
    const bool measured = train.optimizer().has_lamb() || train.optimizer().has_lars();
    if (measured && absl::StartsWith(strategy, "zero")) {
      Report("train.optimizer", absl::StrCat("lamb and lars do not go with strategy ", strategy, " on GPUs; use ddp"));
    }
    if (!train.gpu().graphs()) return;
    if (train.phases_size() > 0) Report("train.gpu.graphs", "does not go with phases, each of which is another step; remove one");
    if (strategy != "single" && strategy != "ddp" && strategy != "zero1") {
      Report("train.gpu.graphs", absl::StrCat("does not go with strategy ", strategy, "; use ddp or zero1"));
    }
  }

  void CheckMesh(const v1::TrainSpec& train, int64_t ranks) {
    const std::string& strategy = train.strategy();
    if (!SplitsModel(strategy)) {
      if (train.has_mesh()) {
        Report("train.mesh", absl::StrCat("belongs to strategy tensor, pipeline or mesh, but the strategy is ",
                                          strategy.empty() ? "ddp" : strategy, "; remove one"));
      }
      return;
    }
    const v1::Mesh& mesh = train.mesh();
    Range("train.mesh.data", mesh.data(), 0, kMaxNodes * kMaxPerNode);
    Range("train.mesh.tensor", mesh.tensor(), 0, kMaxNodes);
    Range("train.mesh.pipeline", mesh.pipeline(), 0, kMaxNodes);
    Range("train.mesh.micro_batches", mesh.micro_batches(), 0, 1'000'000);
    if (!mesh.schedule().empty()) OneOf("train.mesh.schedule", mesh.schedule(), {"1f1b", "gpipe"});
    if (train.accumulate() > 1) {
      Report("train.accumulate", absl::StrCat("does not go with strategy ", strategy,
                                              "; train.mesh.micro_batches says in how many parts a step is run"));
    }
    if (ranks == 1) return;  // runs single
    const auto refuse = [&](bool given, absl::string_view path, absl::string_view what) {
      if (given) Report(path, absl::StrCat(what, " does not go with strategy ", strategy, ", which splits the model"));
    };
    refuse(!train.precision().empty() && train.precision() != "fp32", "train.precision", train.precision());
    refuse(train.optimizer().has_lamb(), "train.optimizer", "lamb");
    refuse(train.optimizer().has_lars(), "train.optimizer", "lars");
    refuse(train.has_best(), "train.best", "keeping the best weights");
    refuse(train.has_predict(), "train.predict", "prediction");
    refuse(train.has_ema(), "train.ema", "an average of the weights");
    for (const v1::ParameterGroup& group : train.parameter_groups())
      refuse(group.freeze(), "train.parameter_groups", "freezing parameters");
    if (mesh.data() < 0 || mesh.tensor() < 0 || mesh.pipeline() < 0) return;
    const int64_t given = std::max<int64_t>(1, mesh.data()) * std::max<int64_t>(1, mesh.tensor()) *
                          std::max<int64_t>(1, mesh.pipeline());
    const bool open = mesh.data() == 0 || (strategy == "tensor" && mesh.tensor() == 0) ||
                      (strategy == "pipeline" && mesh.pipeline() == 0);
    if (open ? ranks % given != 0 : ranks != given) {
      Report("train.mesh", absl::StrCat("data x tensor x pipeline is ", given, open ? ", which does not divide " : ", but there are ",
                                        "the ", ranks, " ranks that `resources` asks for"));
    }
    if (strategy == "mesh" && mesh.tensor() <= 1 && mesh.pipeline() <= 1) {
      Report("train.mesh", "splits nothing; set tensor or pipeline above 1, or use strategy ddp");
    }
    const std::string& model = train.model().builtin();
    // An archive may hold a graph, which can be cut into stages but has no halves of layers; whether it does, and
    // where it can be cut, the worker tells.
    if (train.model().source_case() == v1::Model::kArchive && strategy != "tensor" && mesh.tensor() <= 1) {
      if (strategy == "pipeline" && Stages(train, ranks) == 1) {
        Report("train.mesh.pipeline", "is 1, but an archive can only be cut into the stages of a pipeline; use 2 or more, or "
                                      "strategy ddp");
      }
      return;
    }
    if (model != "mlp" && model != "transformer") {
      Report("train.strategy", absl::StrCat(strategy, " splits the layers of a built-in mlp or transformer, and exported graphs "
                                            "into the stages of a pipeline, not ",
                                            model.empty() ? "a module that was handed over" : model,
                                            "; use ddp, or zero1, zero2, zero3 to save memory"));
      return;
    }
    CheckMeshOptions(train, ranks);
  }

  // Sizes of the mesh, as the worker's MeshOf (agent/worker/training/strategy.cc) fills them in.
  static int64_t Parts(const v1::TrainSpec& train, int64_t ranks) {
    const v1::Mesh& mesh = train.mesh();
    const int64_t others = std::max<int64_t>(1, mesh.data()) * std::max<int64_t>(1, mesh.pipeline());
    return mesh.tensor() > 0 ? mesh.tensor() : train.strategy() == "tensor" ? ranks / others : 1;
  }
  static int64_t Stages(const v1::TrainSpec& train, int64_t ranks) {
    const v1::Mesh& mesh = train.mesh();
    if (mesh.pipeline() > 0) return mesh.pipeline();
    return train.strategy() == "pipeline" ? ranks / (std::max<int64_t>(1, mesh.data()) * Parts(train, ranks)) : 1;
  }

  // What of the model's options a mesh cannot do.
  void CheckMeshOptions(const v1::TrainSpec& train, int64_t ranks) {
    const int64_t tensor = Parts(train, ranks), pipeline = Stages(train, ranks);
    const auto& options = train.model().options().fields();
    const auto given = [&](const char* name) -> const google::protobuf::Value* {
      const auto found = options.find(name);
      return found == options.end() || found->second.has_null_value() ? nullptr : &found->second;
    };
    const auto number = [&](const char* name, double otherwise) {
      return given(name) == nullptr ? otherwise : given(name)->number_value();
    };
    const auto divides = [&](const std::string& name, double value) {
      if (std::fmod(value, static_cast<double>(tensor)) == 0) return;
      Report(absl::StrCat("train.model.options.", name),
             absl::StrCat(NumberText(value), " cannot be shared by ", tensor, " ranks (tensor); make it a multiple"));
    };
    if (tensor > 1) {
      if (number("dropout", 0) > 0) {
        Report("train.model.options.dropout", "ranks that share layers would drop different things; set it to 0");
      }
      if (train.model().builtin() == "transformer") {
        divides("heads", number("heads", 4));
        if (given("vocabulary") != nullptr) divides("vocabulary", number("vocabulary", 0));
      } else if (const auto* hidden = given("hidden"); hidden == nullptr) {
        divides("hidden", kDefaultHidden);
      } else {
        const auto& widths = hidden->list_value().values();
        for (int i = 0; i < widths.size(); i += 2) divides("hidden", widths.Get(i).number_value());
      }
    }
    if (pipeline > 1 && train.model().builtin() == "transformer") {
      if (given("tied") == nullptr || given("tied")->bool_value()) {
        Report("train.model.options.tied",
               "is true (the default), but the first and the last stage of a pipeline cannot share the embedding; set it "
               "to false");
      }
    }
    // A stage has at least a layer: of an mlp a linear one; of a transformer a block, the embedding or the output.
    double layers = number("layers", 2) + 2;
    if (train.model().builtin() == "mlp") {
      const auto* hidden = given("hidden");
      layers = hidden == nullptr ? 2 : hidden->list_value().values_size() + 1;
    }
    if (static_cast<double>(pipeline) > layers) {
      Report("train.mesh.pipeline", absl::StrCat(pipeline, " stages are more than the model's ", NumberText(layers), " layers"));
    }
  }

  void CheckPredict(const v1::TrainSpec& train) {
    if (!train.has_predict()) return;
    const v1::Predict& predict = train.predict();
    if (!predict.split().empty()) {
      OneOf("train.predict.split", predict.split(), {"train", "validation", "test", "all"});
    }
    if (!predict.format().empty()) OneOf("train.predict.format", predict.format(), {"npy", "netcdf"});
    if (predict.weights().empty() && train.model().source_case() == v1::Model::kBuiltin) {
      Report("train.predict.weights", "is missing; a built-in model needs the weights of a job, such as weights.safetensors");
    }
  }

  void CheckProfile(const v1::Profile& profile) {
    Range("train.profile.trace_steps", profile.trace_steps(), 0, 10'000);
    Range("train.profile.at_step", profile.at_step(), 0, std::numeric_limits<int64_t>::max());
    if (profile.has_hang_timeout()) {
      const int64_t seconds = profile.hang_timeout().seconds();
      if (seconds < 1 || seconds > kMaxWallSeconds) {
        Report("train.profile.hang_timeout", "is out of range; use 1s to 720h (30 days)");
      }
    }
  }

  void CheckAdam(const std::string& at, const v1::Adam& adam) {
    if (adam.has_lr()) Above(absl::StrCat(at, ".lr"), adam.lr(), 0);
    if (adam.has_beta1()) Fraction(absl::StrCat(at, ".beta1"), adam.beta1());
    if (adam.has_beta2()) Fraction(absl::StrCat(at, ".beta2"), adam.beta2());
    if (adam.has_eps()) Above(absl::StrCat(at, ".eps"), adam.eps(), 0);
    if (adam.has_weight_decay()) AtLeast(absl::StrCat(at, ".weight_decay"), adam.weight_decay(), 0);
  }

  void CheckOptimizer(const v1::Optimizer& optimizer, bool given, const std::string& at) {
    switch (optimizer.kind_case()) {
      case v1::Optimizer::kSgd: {
        const v1::Sgd& sgd = optimizer.sgd();
        if (sgd.has_lr()) Above(at + ".sgd.lr", sgd.lr(), 0);
        AtLeast(at + ".sgd.momentum", sgd.momentum(), 0);
        AtLeast(at + ".sgd.weight_decay", sgd.weight_decay(), 0);
        AtLeast(at + ".sgd.dampening", sgd.dampening(), 0);
        if (sgd.nesterov() && (!(sgd.momentum() > 0) || sgd.dampening() != 0)) {
          Report(at + ".sgd.nesterov", "needs a momentum above 0 and no dampening");
        }
        return;
      }
      case v1::Optimizer::kAdam: return CheckAdam(at + ".adam", optimizer.adam());
      case v1::Optimizer::kAdamw: return CheckAdam(at + ".adamw", optimizer.adamw());
      case v1::Optimizer::kRmsprop: {
        const v1::RmsProp& rmsprop = optimizer.rmsprop();
        if (rmsprop.has_lr()) Above(at + ".rmsprop.lr", rmsprop.lr(), 0);
        if (rmsprop.has_alpha()) Fraction(at + ".rmsprop.alpha", rmsprop.alpha());
        if (rmsprop.has_eps()) Above(at + ".rmsprop.eps", rmsprop.eps(), 0);
        AtLeast(at + ".rmsprop.weight_decay", rmsprop.weight_decay(), 0);
        AtLeast(at + ".rmsprop.momentum", rmsprop.momentum(), 0);
        return;
      }
      case v1::Optimizer::kAdagrad: {
        const v1::Adagrad& adagrad = optimizer.adagrad();
        if (adagrad.has_lr()) Above(at + ".adagrad.lr", adagrad.lr(), 0);
        AtLeast(at + ".adagrad.lr_decay", adagrad.lr_decay(), 0);
        AtLeast(at + ".adagrad.weight_decay", adagrad.weight_decay(), 0);
        AtLeast(at + ".adagrad.initial_accumulator", adagrad.initial_accumulator(), 0);
        if (adagrad.has_eps()) AtLeast(at + ".adagrad.eps", adagrad.eps(), 0);
        return;
      }
      case v1::Optimizer::kLamb: {
        const v1::Lamb& lamb = optimizer.lamb();
        if (lamb.has_lr()) Above(at + ".lamb.lr", lamb.lr(), 0);
        if (lamb.has_beta1()) Fraction(at + ".lamb.beta1", lamb.beta1());
        if (lamb.has_beta2()) Fraction(at + ".lamb.beta2", lamb.beta2());
        if (lamb.has_eps()) Above(at + ".lamb.eps", lamb.eps(), 0);
        if (lamb.has_weight_decay()) AtLeast(at + ".lamb.weight_decay", lamb.weight_decay(), 0);
        return;
      }
      case v1::Optimizer::kLars: {
        const v1::Lars& lars = optimizer.lars();
        if (lars.has_lr()) Above(at + ".lars.lr", lars.lr(), 0);
        if (lars.has_momentum()) AtLeast(at + ".lars.momentum", lars.momentum(), 0);
        if (lars.has_weight_decay()) AtLeast(at + ".lars.weight_decay", lars.weight_decay(), 0);
        if (lars.has_trust()) Above(at + ".lars.trust", lars.trust(), 0);
        if (lars.nesterov() && lars.has_momentum() && !(lars.momentum() > 0)) {
          Report(at + ".lars.nesterov", "needs a momentum above 0");
        }
        return;
      }
      case v1::Optimizer::kLbfgs: {
        const v1::Lbfgs& lbfgs = optimizer.lbfgs();
        if (lbfgs.has_lr()) Above(at + ".lbfgs.lr", lbfgs.lr(), 0);
        if (lbfgs.has_max_iter()) Range(at + ".lbfgs.max_iter", lbfgs.max_iter(), 1, 1'000'000);
        if (lbfgs.has_max_eval()) Range(at + ".lbfgs.max_eval", lbfgs.max_eval(), 1, 1'000'000);
        if (lbfgs.has_tolerance_grad()) AtLeast(at + ".lbfgs.tolerance_grad", lbfgs.tolerance_grad(), 0);
        if (lbfgs.has_tolerance_change()) AtLeast(at + ".lbfgs.tolerance_change", lbfgs.tolerance_change(), 0);
        if (lbfgs.has_history()) Range(at + ".lbfgs.history", lbfgs.history(), 1, kMaxPairs);
        return;
      }
      case v1::Optimizer::KIND_NOT_SET:
        if (given) {
          Report(at,
                 "names no optimizer; use one of sgd, adam, adamw, rmsprop, adagrad, lamb, lars, lbfgs");
        }
        return;
    }
  }
};

}  // namespace

void CheckTrain(const v1::TrainSpec& train, const v1::Resources& resources, Problems* problems) {
  TrainChecks(problems).Check(train, resources);
}

}  // namespace itwin

#include "agent/worker/spec/train_spec.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <system_error>

#include "agent/worker/error.h"
#include "agent/worker/spec/parse.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxBatch = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxParts = 1'000'000;  // of a step

double ParseDuration(JsonObject& in, const std::string& key, double fallback) {
  const Json* json = in.Find(key);
  if (json == nullptr) return fallback;
  if (json->is_string()) {
    const std::string& text = json->get_ref<const std::string&>();
    if (text.size() > 1 && text.back() == 's') {
      char* end = nullptr;
      const double seconds = std::strtod(text.c_str(), &end);
      if (end == text.c_str() + text.size() - 1 && seconds > 0 && std::isfinite(seconds))
        return seconds;
    }
  }
  in.Refuse(key, "is " + json->dump() + R"(; it must be a duration in seconds such as "1800s")");
}

Resources ParseResources(const Json& json) {
  JsonObject in(json, "resources");
  Resources r;
  in.Get("nodes", r.nodes);
  in.Get("ranks_per_node", r.ranks_per_node);
  in.Get("cpus_per_rank", r.cpus_per_rank);
  in.Get("gpus_per_node", r.gpus_per_node);
  in.Get("memory_mib_per_node", r.memory_mib_per_node);
  r.time_seconds = ParseDuration(in, "time", r.time_seconds);
  in.Done();
  if (r.nodes == 0) r.nodes = 1;
  if (r.ranks_per_node == 0) r.ranks_per_node = 1;
  in.AtLeast("nodes", r.nodes, 1);
  in.AtLeast("ranks_per_node", r.ranks_per_node, 1);
  in.AtLeast("cpus_per_rank", r.cpus_per_rank, 0);
  in.AtLeast("gpus_per_node", r.gpus_per_node, 0);
  return r;
}

ModelSpec ParseModel(const Json& json) {
  JsonObject in(json, "train.model");
  ModelSpec m;
  const std::string source = in.OneOf({"torchscript", "archive", "builtin"});
  in.Get("torchscript", m.torchscript);
  in.Get("archive", m.archive);
  in.Get("builtin", m.builtin);
  if (const Json* options = in.Find("options")) {
    if (!options->is_object()) in.Refuse("options", "must be an object");
    m.options = *options;
  }
  in.Done();
  if (source == "archive" && !m.options.empty())
    in.Refuse("options", "are for built-in models; an archive is complete as it is");
  if (source.empty() || (m.torchscript.empty() && m.archive.empty() && m.builtin.empty())) {
    in.Refuse("", "names no model; give `builtin: <name>`, `archive: <file>` or `torchscript: <file>`");
  }
  return m;
}

DdpSpec ParseDdp(const Json& json) {
  JsonObject in(json, "train.ddp");
  DdpSpec d;
  in.Read("bucket_mb", d.bucket_mb, "first_bucket_mb", d.first_bucket_mb, "overlap", d.overlap,
          "compression", d.compression);
  if (d.compression.empty()) d.compression = "none";
  if (d.compression != "none" && d.compression != "fp16" && d.compression != "bf16")
    in.Refuse("compression", "is \"" + d.compression + "\"; known: none, fp16, bf16");
  if (d.bucket_mb == 0) d.bucket_mb = DdpSpec{}.bucket_mb;
  if (d.first_bucket_mb == 0) d.first_bucket_mb = DdpSpec{}.first_bucket_mb;
  in.AllAtLeast(0, "bucket_mb", d.bucket_mb, "first_bucket_mb", d.first_bucket_mb);
  return d;
}

LocalSgdSpec ParseLocalSgd(const Json& json) {
  JsonObject in(json, "train.local_sgd");
  LocalSgdSpec l;
  in.Read("every", l.every);
  in.AtLeast("every", l.every, 1);
  return l;
}

HorovodSpec ParseHorovod(const Json& json) {
  JsonObject in(json, "train.horovod");
  HorovodSpec h;
  in.Read("fusion_mb", h.fusion_mb, "cycle_ms", h.cycle_ms, "adasum", h.adasum);
  if (h.fusion_mb == 0) h.fusion_mb = HorovodSpec{}.fusion_mb;
  if (h.cycle_ms == 0) h.cycle_ms = HorovodSpec{}.cycle_ms;
  in.AllAtLeast(0, "fusion_mb", h.fusion_mb, "cycle_ms", h.cycle_ms);
  return h;
}

ZeroSpec ParseZero(const Json& json) {
  JsonObject in(json, "train.zero");
  ZeroSpec z;
  in.Read("bucket_mb", z.bucket_mb, "overlap", z.overlap);
  if (z.bucket_mb == 0) z.bucket_mb = ZeroSpec{}.bucket_mb;
  in.AtLeast("bucket_mb", z.bucket_mb, 0);
  return z;
}

MeshSpec ParseMesh(const Json& json) {
  JsonObject in(json, "train.mesh");
  MeshSpec m;
  in.Read("data", m.data, "tensor", m.tensor, "pipeline", m.pipeline, "schedule", m.schedule,
          "micro_batches", m.micro_batches);
  if (m.schedule.empty()) m.schedule = MeshSpec{}.schedule;
  if (m.micro_batches == 0) m.micro_batches = MeshSpec{}.micro_batches;
  for (const auto& [key, value] : {std::pair{"data", m.data}, {"tensor", m.tensor},
                                   {"pipeline", m.pipeline}, {"micro_batches", m.micro_batches}}) {
    in.AtLeast(key, value, 0);
  }
  if (m.schedule != "1f1b" && m.schedule != "gpipe")
    in.Refuse("schedule", "is \"" + m.schedule + "\"; known: 1f1b, gpipe");
  return m;
}

CheckpointSpec ParseCheckpoint(const Json& json) {
  JsonObject in(json, "train.checkpoint");
  CheckpointSpec c;
  in.Read("every_epochs", c.every_epochs, "keep", c.keep, "background", c.background,
          "export_optimizer", c.export_optimizer);
  if (c.keep == 0) c.keep = CheckpointSpec{}.keep;
  in.AtLeast("every_epochs", c.every_epochs, 0);
  in.AtLeast("keep", c.keep, 1);
  return c;
}

Precision ParsePrecision(JsonObject& in) {
  std::string precision;
  in.Get("precision", precision);
  if (precision.empty() || precision == "fp32") return Precision::kFloat32;
  if (precision == "bf16") return Precision::kBfloat16;
  if (precision == "fp16") return Precision::kFloat16;
  in.Refuse("precision", "is \"" + precision + "\"; known: fp32, bf16, fp16");
}

LossScaleSpec ParseLossScale(const Json& json) {
  JsonObject in(json, "train.loss_scale");
  LossScaleSpec s;
  in.Read("initial", s.initial, "window", s.window, "hysteresis", s.hysteresis,
          "smallest", s.smallest);
  if (!(s.smallest > 0)) in.Refuse("smallest", "must be above 0");
  in.AtLeast("initial", s.initial, s.smallest);
  in.AllAtLeast(1, "window", static_cast<double>(s.window),
                "hysteresis", static_cast<double>(s.hysteresis));
  return s;
}

double ParseEma(const Json& json) {
  JsonObject in(json, "train.ema");
  double decay = 0.999;
  in.Read("decay", decay);
  if (!(decay > 0 && decay < 1)) in.Refuse("decay", "must be above 0 and below 1");
  return decay;
}

EarlyStoppingSpec ParseEarlyStopping(const Json& json) {
  JsonObject in(json, "train.early_stopping");
  EarlyStoppingSpec s;
  ParseWatched(in, s);
  in.Read("patience", s.patience, "min_delta", s.min_delta);
  if (s.patience == 0) s.patience = EarlyStoppingSpec{}.patience;
  in.AtLeast("patience", s.patience, 1);
  in.AtLeast("min_delta", s.min_delta, 0);
  return s;
}

BestSpec ParseBest(const Json& json) {
  JsonObject in(json, "train.best");
  BestSpec s;
  ParseWatched(in, s);
  in.Read("export", s.export_best);
  return s;
}

LossOptions ParseLossOptions(const Json& json, const std::string& loss) {
  JsonObject in(json, "train.loss_options");
  LossOptions o;
  in.Read("label_smoothing", o.label_smoothing, "class_weights", o.class_weights, "delta", o.delta,
          "beta", o.beta, "gamma", o.gamma, "quantiles", o.quantiles, "smooth", o.smooth,
          "members", o.members);
  const auto belongs = [&](const char* key, const std::set<std::string>& losses) {
    const auto given = json.find(key);
    if (given == json.end() || given->is_null() || losses.contains(loss)) return;
    const bool zero = given->is_number() && given->get<double>() == 0;
    if (given->is_array() ? given->empty() : zero && !std::set<std::string>{"gamma", "smooth"}.contains(key))
      return;  // as protobuf spells "not given"
    std::string names;
    for (const std::string& name : losses) names += (names.empty() ? "" : ", ") + name;
    in.Refuse(key, "belongs to the loss " + names +
                       (loss.empty() ? "" : "; this job's is " + loss));
  };
  belongs("label_smoothing", {"cross_entropy"});
  belongs("class_weights", {"cross_entropy", "nll", "focal"});
  belongs("delta", {"huber"});
  belongs("beta", {"smooth_l1"});
  belongs("gamma", {"focal"});
  belongs("quantiles", {"quantile"});
  belongs("smooth", {"dice"});
  belongs("members", {"crps_ensemble"});
  if (o.members != 0) in.AtLeast("members", o.members, 2);
  if (!(o.label_smoothing >= 0 && o.label_smoothing < 1))
    in.Refuse("label_smoothing", "must be at least 0 and below 1");
  for (double weight : o.class_weights) {
    if (!(weight >= 0 && std::isfinite(weight))) in.Refuse("class_weights", "must be at least 0");
  }
  if (!(o.delta > 0)) in.Refuse("delta", "must be above 0");
  if (!(o.beta > 0)) in.Refuse("beta", "must be above 0");
  in.AllAtLeast(0, "gamma", o.gamma, "smooth", o.smooth);
  for (size_t i = 0; i < o.quantiles.size(); ++i) {
    if (!(o.quantiles[i] > (i == 0 ? 0 : o.quantiles[i - 1]) && o.quantiles[i] < 1))
      in.Refuse("quantiles", "must rise, between 0 and 1");
  }
  return o;
}

PredictSpec ParsePredict(const Json& json) {
  JsonObject in(json, "train.predict");
  PredictSpec p;
  std::string split, format;
  in.Get("weights", p.weights);
  in.Get("preprocessing", p.preprocessing);
  in.Get("split", split);
  in.Get("format", format);
  in.Done();
  if (!split.empty()) p.split = split;
  if (!format.empty()) p.format = format;
  if (p.split != "train" && p.split != "validation" && p.split != "test" && p.split != "all") {
    in.Refuse("split", "is \"" + p.split + "\"; known: train, validation, test, all");
  }
  if (p.format != "npy" && p.format != "netcdf") {
    in.Refuse("format", "is \"" + p.format + "\"; known: npy, netcdf");
  }
  return p;
}

GpuSpec ParseGpu(const Json& json) {
  JsonObject in(json, "train.gpu");
  GpuSpec g{.given = true};
  in.Get("tf32", g.tf32);
  in.Get("channels_last", g.channels_last);
  in.Get("graphs", g.graphs);
  in.Done();
  return g;
}

ProfileSpec ParseProfile(const Json& json) {
  JsonObject in(json, "train.profile");
  ProfileSpec p;
  in.Get("trace_steps", p.trace_steps);
  in.Get("at_step", p.at_step);
  p.hang_timeout_seconds = ParseDuration(in, "hang_timeout", p.hang_timeout_seconds);
  in.Done();
  if (p.at_step == 0) p.at_step = ProfileSpec{}.at_step;
  in.AtLeast("trace_steps", p.trace_steps, 0);
  in.AtLeast("at_step", static_cast<double>(p.at_step), 1);
  in.AtLeast("hang_timeout", p.hang_timeout_seconds, 1);
  return p;
}

// LBFGS needs the whole gradient of one unchanging loss on every rank.
void CheckLbfgs(const JsonObject& in, const TrainSpec& t) {
  for (size_t i = 0; i < t.phases.size(); ++i) {
    if (std::holds_alternative<Lbfgs>(t.phases[i].optimizer))
      in.Refuse("phases[" + std::to_string(i) + "].optimizer", "is lbfgs, which trains all parameters by itself");
  }
  if (!std::holds_alternative<Lbfgs>(t.optimizer)) return;
  const auto refuse = [&](bool given, const char* key, const char* why) {
    if (given) in.Refuse(key, std::string("does not go with the optimizer lbfgs, ") + why);
  };
  refuse(!t.strategy.empty() && t.strategy != "single" && t.strategy != "ddp", "strategy",
         "which works with single and ddp");
  refuse(t.local_sgd.every > 1, "local_sgd", "whose ranks must see the same gradient");
  refuse(t.precision == Precision::kFloat16, "precision", "whose search has no step to skip; use fp32 or bf16");
  refuse(t.clip_norm > 0, "clip_norm", "which needs the gradient as it is");
  refuse(t.clip_value > 0, "clip_value", "which needs the gradient as it is");
  for (const ParameterGroupSpec& group : t.parameter_groups)
    refuse(!group.freeze, "parameter_groups", "which has one rate for all; groups can only freeze");
}

void ParseTrain(const Json& json, TrainSpec& t) {
  JsonObject in(json, "train");
  const Json* model = in.Find("model");
  if (model == nullptr)
    in.Refuse("model", "is missing; give `builtin: <name>`, `archive: <file>` or `torchscript: <file>`");
  t.model = ParseModel(*model);
  const Json* data = in.Find("data");
  if (data == nullptr)
    in.Refuse("data", "is missing; give one of netcdf, idx, npz, npy, csv, synthetic");
  t.data = ParseData(*data);
  in.Get("loss", t.loss);
  in.Get("metrics", t.metrics);
  if (const Json* optimizer = in.Find("optimizer")) t.optimizer = ParseOptimizer(*optimizer);
  in.Get("batch", t.batch);
  in.Get("epochs", t.epochs);
  in.Get("steps", t.steps);
  in.Get("strategy", t.strategy);
  if (const Json* ddp = in.Find("ddp")) t.ddp = ParseDdp(*ddp);
  in.Get("seed", t.seed);
  in.Get("validate_every", t.validate_every);
  if (const Json* checkpoint = in.Find("checkpoint")) t.checkpoint = ParseCheckpoint(*checkpoint);
  in.Get("clip_norm", t.clip_norm);
  in.Get("stop_on_nan", t.stop_on_nan);
  in.Get("accumulate", t.accumulate);
  if (const Json* local = in.Find("local_sgd")) t.local_sgd = ParseLocalSgd(*local);
  if (const Json* horovod = in.Find("horovod")) t.horovod = ParseHorovod(*horovod);
  if (const Json* zero = in.Find("zero")) t.zero = ParseZero(*zero);
  if (const Json* mesh = in.Find("mesh")) t.mesh = ParseMesh(*mesh);
  in.Get("check_every", t.check_every);
  if (const Json* schedule = in.Find("schedule")) t.schedule = ParseSchedule(*schedule);
  if (const Json* groups = in.Find("parameter_groups"))
    t.parameter_groups = ParseParameterGroups(*groups);
  if (const Json* phases = in.Find("phases")) t.phases = ParsePhases(*phases);
  if (!t.phases.empty()) {
    if (in.Find("optimizer") != nullptr)
      in.Refuse("phases", "have an optimizer each; leave `optimizer` out");
    if (!t.model.builtin.empty())
      in.Refuse("phases", "are for TorchScript modules with a method each, not for built-in models");
    if (!t.loss.empty()) in.Refuse("phases", "have methods that bring their own loss; leave `loss` out");
  }
  in.Get("clip_value", t.clip_value);
  if (const Json* options = in.Find("loss_options"))
    t.loss_options = ParseLossOptions(*options, t.loss);
  t.precision = ParsePrecision(in);
  if (const Json* scale = in.Find("loss_scale")) {
    if (t.precision != Precision::kFloat16) in.Refuse("loss_scale", "belongs to precision fp16");
    t.loss_scale = ParseLossScale(*scale);
  }
  if (const Json* ema = in.Find("ema")) t.ema = ParseEma(*ema);
  if (const Json* stopping = in.Find("early_stopping"))
    t.early_stopping = ParseEarlyStopping(*stopping);
  if (const Json* best = in.Find("best")) t.best = ParseBest(*best);
  in.Get("validate_every_steps", t.validate_every_steps);
  in.AtLeast("validate_every_steps", static_cast<double>(t.validate_every_steps), 0);
  in.Get("deterministic", t.deterministic);
  in.Get("top_k", t.top_k);
  if (t.top_k == 0) t.top_k = TrainSpec{}.top_k;
  in.AtLeast("clip_value", t.clip_value, 0);
  in.AtLeast("top_k", t.top_k, 1);
  if (t.loss == "quantile" && t.loss_options.quantiles.empty())
    in.Refuse("loss_options.quantiles", "is missing; the loss quantile needs them, as in [0.1, 0.5, 0.9]");
  if (const Json* gpu = in.Find("gpu")) t.gpu = ParseGpu(*gpu);
  if (const Json* predict = in.Find("predict")) t.predict = ParsePredict(*predict);
  if (const Json* profile = in.Find("profile")) t.profile = ParseProfile(*profile);
  in.Done();
  // Zero is how protobuf spells "not given" for these.
  if (t.batch == 0) t.batch = 32;
  if (t.epochs == 0) t.epochs = 1;
  if (t.validate_every == 0) t.validate_every = 1;
  if (t.accumulate == 0) t.accumulate = 1;
  in.AtLeast("batch", static_cast<double>(t.batch), 1);
  in.AtLeast("epochs", t.epochs, 1);
  in.AtLeast("steps", static_cast<double>(t.steps), 0);
  in.AtLeast("validate_every", t.validate_every, 1);
  in.AtLeast("clip_norm", t.clip_norm, 0);
  in.AtLeast("accumulate", t.accumulate, 1);
  const auto at_most = [&](const char* key, int64_t value, int64_t most, const char* why) {
    if (value <= most) return;
    in.Refuse(key, "is " + std::to_string(value) + "; it must be at most " + std::to_string(most) + why);
  };
  at_most("batch", t.batch, kMaxBatch, "");
  at_most("accumulate", t.accumulate, kMaxParts, "");
  at_most("accumulate", t.accumulate, t.batch, ", the samples of the batch");
  in.AtLeast("check_every", t.check_every, 0);
  const std::vector<std::string> strategies = {"single", "ddp",    "horovod",  "zero1", "zero2",
                                               "zero3",  "tensor", "pipeline", "mesh"};
  if (!t.strategy.empty() &&
      std::find(strategies.begin(), strategies.end(), t.strategy) == strategies.end()) {
    std::string known;
    for (const std::string& name : strategies) known += (known.empty() ? "" : ", ") + name;
    in.Refuse("strategy", "is \"" + t.strategy + "\"; known: " + known);
  }
  const bool all_reduce = t.strategy.empty() || t.strategy == "single" || t.strategy == "ddp";
  if (t.local_sgd.every > 1 && !all_reduce)
    in.Refuse("local_sgd", "belongs to strategy ddp, not " + t.strategy);
  const bool mesh = t.strategy == "tensor" || t.strategy == "pipeline" || t.strategy == "mesh";
  if (mesh && t.accumulate > 1)
    in.Refuse("accumulate", "is train.mesh.micro_batches with strategy " + t.strategy);
  CheckLbfgs(in, t);
}

}  // namespace

TrainSpec ParseSpec(const Json& job) {
  JsonObject in(job, "");
  TrainSpec spec;
  in.Get("name", spec.name);
  if (const Json* resources = in.Find("resources")) spec.resources = ParseResources(*resources);
  // These are the gateway's and the agent's; the worker only knows that they may stand here.
  for (const char* key : {"site", "env", "inputs", "retry", "labels", "image"}) in.Find(key);
  if (in.Find("command") != nullptr)
    in.Refuse("command", "is not for itwin-worker; it runs `train` jobs");
  const Json* train = in.Find("train");
  if (train == nullptr) in.Refuse("train", "is missing; itwin-worker needs to know what to train");
  ParseTrain(*train, spec);
  in.Done();
  return spec;
}

namespace {

// The path and what is there.
std::pair<std::filesystem::path, std::filesystem::file_status> Resolve(const std::string& name,
                                                                       const std::filesystem::path& work_dir,
                                                                       const std::string& field, const char* what) {
  namespace fs = std::filesystem;
  constexpr std::string_view kSite = "site:";
  fs::path path = name.starts_with(kSite) ? fs::path(name.substr(kSite.size())) : fs::path(name);
  if (name.empty()) throw UserError(field + " is empty; it must name a " + what);
  if (name.starts_with(kSite) && !path.is_absolute()) {
    throw UserError(field + " is \"" + name + "\"; a " + what + " of the site needs an absolute path");
  }
  if (path.is_relative()) {
    for (const fs::path& part : path) {
      if (part == "..")
        throw UserError(field + " is \"" + name + "\"; a path must not contain \"..\"");
    }
    path = work_dir / path;
  }
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) {
    throw UserError(field + ": there is no " + what + " \"" + name + "\" (looked for " + path.string() + ")");
  }
  return {path, status};
}

}  // namespace

std::filesystem::path ResolveFile(const std::string& name, const std::filesystem::path& work_dir,
                                  const std::string& field) {
  const auto [path, status] = Resolve(name, work_dir, field, "file");
  if (std::filesystem::is_directory(status)) {
    throw UserError(field + ": \"" + name + "\" is a directory; it must be a file");
  }
  return path;
}

std::filesystem::path ResolveDirectory(const std::string& name, const std::filesystem::path& work_dir,
                                       const std::string& field) {
  const auto [path, status] = Resolve(name, work_dir, field, "directory");
  if (!std::filesystem::is_directory(status)) {
    throw UserError(field + ": \"" + name + "\" is a file; it must be a directory");
  }
  return path;
}

}  // namespace itwin::worker

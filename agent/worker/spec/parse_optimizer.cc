#include "agent/worker/spec/parse.h"

#include <algorithm>
#include <utility>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::json;

void CheckRate(const JsonObject& in, double lr) {
  if (!(lr > 0)) in.Refuse("lr", "is " + Json(lr).dump() + "; the learning rate must be above 0");
}
void CheckUnit(const JsonObject& in, const std::string& key, double value) {
  if (!(value >= 0 && value < 1)) {
    in.Refuse(key, "is " + Json(value).dump() + "; it must be at least 0 and below 1");
  }
}

template <typename AdamLike>
AdamLike ParseAdam(JsonObject& in) {
  AdamLike o;
  in.Read("lr", o.lr, "beta1", o.beta1, "beta2", o.beta2, "eps", o.eps,
          "weight_decay", o.weight_decay);
  CheckRate(in, o.lr);
  CheckUnit(in, "beta1", o.beta1);
  CheckUnit(in, "beta2", o.beta2);
  in.AllAtLeast(0, "eps", o.eps, "weight_decay", o.weight_decay);
  return o;
}

Lbfgs ParseLbfgs(JsonObject& in) {
  Lbfgs o;
  in.Get("lr", o.lr);
  in.Get("max_iter", o.max_iter);
  o.max_eval = std::max(1, static_cast<int>(int64_t{5} * o.max_iter / 4));
  in.Read("max_eval", o.max_eval, "tolerance_grad", o.tolerance_grad,
          "tolerance_change", o.tolerance_change, "history", o.history,
          "strong_wolfe", o.strong_wolfe);
  CheckRate(in, o.lr);
  in.AllAtLeast(1, "max_iter", o.max_iter, "max_eval", o.max_eval);
  in.AllAtLeast(0, "tolerance_grad", o.tolerance_grad, "tolerance_change", o.tolerance_change);
  in.AtLeast("history", o.history, 1);
  return o;
}

}  // namespace

OptimizerSpec ParseOptimizer(const Json& json, const std::string& path) {
  JsonObject in(json, path);
  const std::string kind =
      in.OneOf({"sgd", "adam", "adamw", "rmsprop", "adagrad", "lamb", "lars", "lbfgs"});
  in.Done();
  if (kind.empty()) return Adam{};
  JsonObject body(*in.Find(kind), path + "." + kind);
  if (kind == "adam") return ParseAdam<Adam>(body);
  if (kind == "adamw") return ParseAdam<AdamW>(body);
  if (kind == "lamb") return ParseAdam<Lamb>(body);
  if (kind == "lbfgs") return ParseLbfgs(body);
  if (kind == "lars") {
    Lars o;
    body.Read("lr", o.lr, "momentum", o.momentum, "weight_decay", o.weight_decay, "trust", o.trust,
              "nesterov", o.nesterov);
    CheckRate(body, o.lr);
    body.AllAtLeast(0, "momentum", o.momentum, "weight_decay", o.weight_decay);
    if (!(o.trust > 0)) body.Refuse("trust", "must be above 0");
    if (o.nesterov && o.momentum <= 0) body.Refuse("nesterov", "needs a momentum above 0");
    return o;
  }
  if (kind == "adagrad") {
    Adagrad o;
    body.Read("lr", o.lr, "lr_decay", o.lr_decay, "weight_decay", o.weight_decay,
              "initial_accumulator", o.initial_accumulator, "eps", o.eps);
    CheckRate(body, o.lr);
    body.AllAtLeast(0, "lr_decay", o.lr_decay, "weight_decay", o.weight_decay,
                    "initial_accumulator", o.initial_accumulator, "eps", o.eps);
    return o;
  }
  if (kind == "sgd") {
    Sgd o;
    body.Read("lr", o.lr, "momentum", o.momentum, "weight_decay", o.weight_decay,
              "nesterov", o.nesterov, "dampening", o.dampening);
    CheckRate(body, o.lr);
    body.AllAtLeast(0, "momentum", o.momentum, "weight_decay", o.weight_decay);
    if (o.nesterov && (o.momentum <= 0 || o.dampening != 0)) {
      body.Refuse("nesterov", "needs a momentum above 0 and no dampening");
    }
    return o;
  }
  RmsProp o;
  body.Read("lr", o.lr, "alpha", o.alpha, "eps", o.eps, "weight_decay", o.weight_decay,
            "momentum", o.momentum);
  CheckRate(body, o.lr);
  CheckUnit(body, "alpha", o.alpha);
  body.AllAtLeast(0, "eps", o.eps, "weight_decay", o.weight_decay, "momentum", o.momentum);
  return o;
}

std::vector<ParameterGroupSpec> ParseParameterGroups(const Json& json) {
  if (!json.is_array()) throw UserError("train.parameter_groups must be a list");
  std::vector<ParameterGroupSpec> groups;
  for (size_t i = 0; i < json.size(); ++i) {
    JsonObject in(json[i], "train.parameter_groups[" + std::to_string(i) + "]");
    ParameterGroupSpec g;
    in.Read("match", g.match, "lr", g.lr, "weight_decay", g.weight_decay, "freeze", g.freeze);
    if (g.match.empty()) in.Refuse("match", R"(is missing; name parameters, such as ["encoder.*"])");
    if (g.lr && !(*g.lr >= 0)) in.Refuse("lr", "must be at least 0");
    if (g.weight_decay && !(*g.weight_decay >= 0)) in.Refuse("weight_decay", "must be at least 0");
    if (g.freeze && (g.lr || g.weight_decay)) {
      in.Refuse("freeze", "leaves nothing to train, so lr and weight_decay have no meaning");
    }
    groups.push_back(std::move(g));
  }
  return groups;
}

bool ParseDirection(JsonObject& in) {  // true: the larger the better
  std::string direction;
  in.Get("direction", direction);
  if (!direction.empty() && direction != "min" && direction != "max") {
    in.Refuse("direction", "is \"" + direction + "\"; known: min, max");
  }
  return direction == "max";
}

ScheduleSpec ParseSchedule(const Json& json) {
  JsonObject in(json, "train.schedule");
  ScheduleSpec s;
  const std::string kind = in.OneOf({"constant", "linear", "step", "multi_step", "exponential",
                                     "cosine", "one_cycle", "polynomial", "plateau"});
  std::string unit;
  in.Read("unit", unit, "warmup_steps", s.warmup_steps, "warmup_start", s.warmup_start);
  if (!unit.empty() && unit != "step" && unit != "epoch") {
    in.Refuse("unit", "is \"" + unit + "\"; known: step, epoch");
  }
  s.epochs = unit == "epoch";
  in.AllAtLeast(0, "warmup_steps", static_cast<double>(s.warmup_steps),
                "warmup_start", s.warmup_start);
  if (kind.empty()) return s;
  JsonObject body(*in.Find(kind), "train.schedule." + kind);
  const auto length = [&](int64_t& value) {
    body.Get("length", value);
    body.AtLeast("length", static_cast<double>(value), 0);
  };
  const auto above = [&](const char* key, double value) {
    if (!(value > 0)) body.Refuse(key, "is " + Json(value).dump() + "; it must be above 0");
  };
  if (kind == "linear") {
    LinearSchedule o;
    body.Get("start", o.start);
    body.Get("end", o.end);
    length(o.length);
    body.AllAtLeast(0, "start", o.start, "end", o.end);
    s.kind = o;
  } else if (kind == "step") {
    StepSchedule o;
    body.Get("every", o.every);
    body.Get("gamma", o.gamma);
    body.AtLeast("every", static_cast<double>(o.every), 1);
    above("gamma", o.gamma);
    s.kind = o;
  } else if (kind == "multi_step") {
    MultiStepSchedule o;
    body.Get("milestones", o.milestones);
    body.Get("gamma", o.gamma);
    above("gamma", o.gamma);
    if (o.milestones.empty()) body.Refuse("milestones", "is missing; such as [30, 60]");
    for (size_t i = 0; i < o.milestones.size(); ++i) {
      if (o.milestones[i] < (i == 0 ? 1 : o.milestones[i - 1] + 1))
        body.Refuse("milestones", "must rise, from 1");
    }
    s.kind = o;
  } else if (kind == "exponential") {
    ExponentialSchedule o;
    body.Get("gamma", o.gamma);
    above("gamma", o.gamma);
    s.kind = o;
  } else if (kind == "cosine") {
    CosineSchedule o;
    length(o.length);
    body.Get("min_factor", o.min_factor);
    body.AtLeast("min_factor", o.min_factor, 0);
    s.kind = o;
  } else if (kind == "one_cycle") {
    OneCycleSchedule o;
    length(o.length);
    body.Get("rise", o.rise);
    body.Get("initial_divisor", o.initial_divisor);
    body.Get("final_divisor", o.final_divisor);
    body.Get("linear", o.linear);
    if (!(o.rise > 0 && o.rise < 1)) body.Refuse("rise", "must be above 0 and below 1");
    above("initial_divisor", o.initial_divisor);
    above("final_divisor", o.final_divisor);
    if (s.warmup_steps > 0) in.Refuse("warmup_steps", "does not go with one_cycle, which has its own");
    s.kind = o;
  } else if (kind == "polynomial") {
    PolynomialSchedule o;
    length(o.length);
    body.Get("power", o.power);
    body.Get("min_factor", o.min_factor);
    above("power", o.power);
    body.AtLeast("min_factor", o.min_factor, 0);
    s.kind = o;
  } else if (kind == "plateau") {
    PlateauSchedule o;
    body.Get("factor", o.factor);
    body.Get("patience", o.patience);
    body.Get("threshold", o.threshold);
    body.Get("cooldown", o.cooldown);
    body.Get("min_factor", o.min_factor);
    ParseWatched(body, o);
    if (!(o.factor > 0 && o.factor < 1)) body.Refuse("factor", "must be above 0 and below 1");
    body.AllAtLeast(0, "patience", o.patience, "threshold", o.threshold, "cooldown", o.cooldown,
                    "min_factor", o.min_factor);
    s.kind = o;
  }
  body.Done();
  return s;
}

std::vector<PhaseSpec> ParsePhases(const Json& json) {
  if (!json.is_array()) throw UserError("train.phases must be a list");
  std::vector<PhaseSpec> phases;
  for (size_t i = 0; i < json.size(); ++i) {
    const std::string path = "train.phases[" + std::to_string(i) + "]";
    JsonObject in(json[i], path);
    PhaseSpec p;
    in.Get("name", p.name);
    in.Get("match", p.match);
    in.Get("method", p.method);
    if (const Json* optimizer = in.Find("optimizer"))
      p.optimizer = ParseOptimizer(*optimizer, path + ".optimizer");
    in.Read("repeats", p.repeats);
    if (p.name.empty()) in.Refuse("name", "is missing");
    for (const PhaseSpec& other : phases) {
      if (other.name == p.name) in.Refuse("name", "is \"" + p.name + "\", as another phase's");
    }
    if (p.match.empty()) in.Refuse("match", R"(is missing; name its parameters, such as ["generator"])");
    if (p.method.empty()) p.method = p.name + "_step";
    if (p.repeats == 0) p.repeats = 1;
    in.AtLeast("repeats", p.repeats, 1);
    phases.push_back(std::move(p));
  }
  return phases;
}

}  // namespace itwin::worker

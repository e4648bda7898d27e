// The larger parts of `train`, for train_spec.cc. Inside spec/ only.
#pragma once

#include <string>
#include <vector>

#include "agent/worker/spec/json_object.h"
#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {

DataSpec ParseData(const nlohmann::json& json);

OptimizerSpec ParseOptimizer(const nlohmann::json& json, const std::string& path = "train.optimizer");
std::vector<ParameterGroupSpec> ParseParameterGroups(const nlohmann::json& json);
std::vector<PhaseSpec> ParsePhases(const nlohmann::json& json);
ScheduleSpec ParseSchedule(const nlohmann::json& json);

bool ParseDirection(JsonObject& in);  // true: max
// metric and direction, of what watches evaluations.
template <typename Spec>
void ParseWatched(JsonObject& in, Spec& spec) {
  in.Get("metric", spec.metric);
  spec.maximize = ParseDirection(in);
  if (spec.metric.empty()) spec.metric = Spec{}.metric;
  if (!spec.metric.starts_with("validation/")) {
    in.Refuse("metric", "is \"" + spec.metric + "\"; it must be of an evaluation: validation/<name>");
  }
}

}  // namespace itwin::worker

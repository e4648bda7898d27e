#include "agent/worker/report/result.h"

#include <algorithm>
#include <cmath>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/report/metric_sink.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::ordered_json;

const char* Name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kSucceeded:
      return "succeeded";
    case Outcome::kFailed:
      return "failed";
    case Outcome::kSaved:
      return "saved";
  }
  return "";
}

const char* Name(FailureClass failure_class) {
  switch (failure_class) {
    case FailureClass::kUser:
      return "user";
    case FailureClass::kApp:
      return "app";
    case FailureClass::kResource:
      return "resource";
    case FailureClass::kInfra:
      return "infra";
  }
  return "";
}

Json Number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return value;
}

}  // namespace

int ExitCode(FailureClass failure) {
  switch (failure) {
    case FailureClass::kUser:
      return 2;
    case FailureClass::kApp:
      return 3;
    case FailureClass::kResource:
      return 4;
    case FailureClass::kInfra:
      return 5;
  }
  return 3;
}

int ExitCode(const Result& result) {
  if (result.outcome == Outcome::kSucceeded) return 0;
  if (result.outcome == Outcome::kSaved) return 85;
  return ExitCode(result.failure ? result.failure->failure_class : FailureClass::kApp);
}

std::string RenderResult(const Result& result) {
  Json json = {{"format", 1},
               {"attempt", result.attempt},
               {"outcome", Name(result.outcome)},
               {"message", result.message}};
  if (result.failure) {
    Json failure = {{"class", Name(result.failure->failure_class)}};
    if (result.failure->rank) failure["rank"] = *result.failure->rank;
    if (result.failure->step) failure["step"] = *result.failure->step;
    failure["host"] = result.failure->host;
    json["failure"] = failure;
  }
  json["metrics"] = Json::object();
  for (const auto& [name, value] : result.metrics) json["metrics"][name] = Number(value);
  json["steps"] = result.steps;
  json["epochs"] = result.epochs;
  json["outputs"] = Json::array();
  for (const OutputEntry& output : result.outputs) {
    json["outputs"].push_back(
        {{"path", output.path}, {"size", output.size}, {"sha256", output.sha256}});
  }
  json["info"] = result.info;
  json["t"] = std::round(Now() * 1000) / 1000;
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::vector<OutputEntry> ListOutputs(const std::filesystem::path& outputs) {
  namespace fs = std::filesystem;
  std::vector<OutputEntry> entries;
  std::error_code error;
  for (fs::recursive_directory_iterator it(outputs, error), end; !error && it != end;
       it.increment(error)) {
    if (!it->is_regular_file(error) || it->path().extension() == ".tmp") continue;
    const FileDigest digest = DigestFile(it->path());
    entries.push_back(
        {it->path().lexically_relative(outputs).string(), digest.size, digest.sha256});
  }
  if (error) ThrowIoError("cannot list", outputs, error.value());
  std::sort(entries.begin(), entries.end(),
            [](const auto& a, const auto& b) { return a.path < b.path; });
  return entries;
}

}  // namespace itwin::worker

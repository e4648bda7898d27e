// result.json: the last word of a run.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "agent/worker/error.h"

namespace itwin::worker {

enum class Outcome { kSucceeded, kFailed, kSaved };

struct OutputEntry {
  std::string path;  // relative to the outputs directory
  int64_t size = 0;
  std::string sha256;
};

struct Failure {
  FailureClass failure_class = FailureClass::kApp;
  std::optional<int> rank;  // none: no rank in particular
  std::optional<int64_t> step;
  std::string host;
};

struct Result {
  std::string attempt;
  Outcome outcome = Outcome::kSucceeded;
  std::string message;
  std::map<std::string, double> metrics;
  int64_t steps = 0, epochs = 0;
  std::vector<OutputEntry> outputs;
  nlohmann::json info = nlohmann::json::object();
  std::optional<Failure> failure;  // with kFailed
};

// The exit code that belongs to a class of failure, and to a result: 0, 85, or its failure's.
int ExitCode(FailureClass failure);
int ExitCode(const Result& result);

// Any bytes are fine in the texts; what is not UTF-8 is replaced.
std::string RenderResult(const Result& result);

// Regular files below `outputs`, sorted by path, with their digests.
std::vector<OutputEntry> ListOutputs(const std::filesystem::path& outputs);

}  // namespace itwin::worker

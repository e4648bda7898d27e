// Where points and progress go. Rank 0 has the file; the others have a sink that drops everything,
// so that the training loop need not know its rank.
#pragma once

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace itwin::worker {

struct Progress {
  int64_t step = 0, steps = 0;
  int64_t epoch = 0, epochs = 0;
  double samples_per_second = 0;
  std::optional<double> seconds_left;
};

class MetricSink {
 public:
  using Values = std::vector<std::pair<std::string, double>>;
  virtual ~MetricSink() = default;
  // One line with these series. Cheap (well below a microsecond per value): a thread writes.
  virtual void Write(int64_t step, const Values& values) = 0;
  virtual void Write(const Progress& progress) = 0;
  // Returns when all lines are in the file.
  virtual void Flush() = 0;
};

class NullMetricSink : public MetricSink {
 public:
  void Write(int64_t, const Values&) override {}
  void Write(const Progress&) override {}
  void Flush() override {}
};

// Appends JSON Lines (docs/worker-contract.md) in whole lines; a line is in the file a few
// milliseconds after it was written here. When the file cannot be written, the next call throws
// ResourceError (disk full) or AppError.
std::unique_ptr<MetricSink> OpenMetricFile(const std::filesystem::path& path);

// A JSON number, or "NaN", "Infinity", "-Infinity" as strings.
void AppendJsonNumber(std::string& text, double value);
// A quoted JSON string.
void AppendJsonString(std::string& text, std::string_view value);
// Seconds since 1970.
double Now();

}  // namespace itwin::worker

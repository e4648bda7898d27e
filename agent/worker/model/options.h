// Strict reading of a built-in model's options: every option has a default, unknown ones are
// errors. Free of LibTorch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace itwin::worker {

// Call the typed getters for every option the model has, then Finish. Errors (UserError) name the
// path, such as "train.model.options.hidden", the value, and what would be right. Numbers may be
// written as 8 or 8.0: protobuf's Struct knows only doubles.
class OptionReader {
 public:
  OptionReader(std::string model, nlohmann::json options);

  int64_t Int(const std::string& name, int64_t fallback, int64_t lowest, int64_t highest);
  double Number(const std::string& name, double fallback, double lowest, double highest);
  bool Bool(const std::string& name, bool fallback);
  // Between min_count and max_count numbers, each within [lowest, highest].
  std::vector<int64_t> Ints(const std::string& name, const std::vector<int64_t>& fallback,
                            size_t min_count, size_t max_count, int64_t lowest, int64_t highest);

  // Throws for the first option that no getter asked for.
  void Finish() const;
  // Every option with the value that is used: enough to build the same model again.
  const nlohmann::json& resolved() const { return resolved_; }

  // "train.model.options.<name>"
  static std::string Path(const std::string& name) { return "train.model.options." + name; }

 private:
  const nlohmann::json* Find(const std::string& name);

  const std::string model_;
  const nlohmann::json options_;
  nlohmann::json resolved_ = nlohmann::json::object();
};

}  // namespace itwin::worker

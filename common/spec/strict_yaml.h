#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace YAML {
class Node;
}

// Configuration files: YAML mappings in which every key must be known, and every problem is told with its line, each as
// "gateway.yaml:3: listne: unknown key; did you mean 'listen'?".
namespace itwin {

// Reads mappings and keeps what is wrong. Not thread-safe.
class StrictYaml {
 public:
  // Takes a key's value; `path` is how the key is called in a message: "limits.rpc_threads".
  using Take = std::function<void(const YAML::Node& value, const std::string& path)>;
  using Keys = std::vector<std::pair<std::string, Take>>;

  explicit StrictYaml(absl::string_view file_name) : file_name_(file_name) {}

  // The whole text. kInvalidArgument: it is no YAML, or with the problems so far, ten at most.
  absl::Status Read(absl::string_view text, const Take& root);
  absl::Status status() const;

  void Mapping(const YAML::Node& node, const std::string& path, const Keys& keys);
  // One call per element.
  void List(const YAML::Node& node, const std::string& path, size_t most, const Take& element);
  // One call per entry; the key is any text.
  void Entries(const YAML::Node& node, const std::string& path, size_t most,
               const std::function<void(const std::string& key, const YAML::Node&, const std::string& path)>& entry);

  // Readers of one value. What they write to must live until the mapping is read.
  Take Text(std::string* out);
  Take Integer(int* out);
  Take Boolean(bool* out);
  Take Number(double* out);
  Take Time(absl::Duration* out);
  Take Words(std::vector<std::string>* out, absl::string_view example);
  // "512M", "64GiB" or a number of MiB.
  Take Mebibytes(int64_t* out);

  void Problem(const YAML::Node& node, const std::string& path, absl::string_view what);
  // Beyond the syntax, without a line.
  void Problem(const std::string& path, absl::string_view what);

 private:
  const std::string file_name_;
  std::vector<std::string> problems_;
};

// One message of many problems, one per line.
absl::Status ProblemsStatus(std::vector<std::string> problems);

}  // namespace itwin

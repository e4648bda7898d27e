#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace itwin::cli {

struct VerbWords {
  std::string name;
  std::string description;
  std::vector<std::string> options;  // "--watch"
  std::vector<std::string> parts = {};  // second words: "add", "doctor"
  bool takes_job = false;
  bool takes_file = false;
};

// A script for the shell ("bash", "zsh", "fish") made from what the program accepts; job ids are asked of the gateway
// when they are needed. kInvalidArgument for another shell.
absl::StatusOr<std::string> CompletionScript(absl::string_view shell, const std::vector<VerbWords>& verbs,
                                             const std::vector<std::string>& global_options);

}  // namespace itwin::cli

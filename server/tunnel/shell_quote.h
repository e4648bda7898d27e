#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace itwin::server {

// One word for a POSIX shell (and csh, but for line ends) that stands for exactly these bytes. The only place where text
// becomes part of a command line. A NUL cannot be passed: kInvalidArgument.
absl::StatusOr<std::string> QuoteForShell(absl::string_view text);

// The words of a command, each quoted where it needs to be.
absl::StatusOr<std::string> CommandLine(const std::vector<std::string>& argv);

}  // namespace itwin::server

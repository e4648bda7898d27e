#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "itwin/v1/spec.pb.h"

namespace itwin::cli {

struct JobFile {
  std::string text;
  std::string base_directory;  // what the paths in it are relative to
};
// "-" is standard input. kInvalidArgument names the file and what to do.
absl::StatusOr<JobFile> ReadJobFile(const std::string& path);

// The file's spec with the overrides, checked as far as one can without a gateway. Problems name the file.
absl::StatusOr<v1::JobSpec> ParseJobFile(const JobFile& file, const std::string& path,
                                         const std::vector<std::string>& overrides);

}  // namespace itwin::cli

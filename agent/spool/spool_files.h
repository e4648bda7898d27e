#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/files.h"

namespace itwin::agent {

inline constexpr int kMaxListedFiles = 100'000;

struct SpoolFileEntry {
  std::string path;  // relative
  int64_t size_bytes = 0;
};

// Regular files below `directory`, in order of path. Links are neither followed nor listed. A missing directory is
// empty. kResourceExhausted: more than kMaxListedFiles.
absl::StatusOr<std::vector<SpoolFileEntry>> ListFilesBeneath(const std::string& directory);

// Opens a regular file below `directory` for reading. No part of `path` may be a link, so that a job cannot make
// the agent hand out files elsewhere. kInvalidArgument: not a plain relative path. kNotFound: no such regular file.
absl::StatusOr<FileDescriptor> OpenBeneath(const std::string& directory, const std::string& path);

// Removes a directory with all in it; a missing one is fine.
absl::Status RemoveTree(const std::string& path);

}  // namespace itwin::agent

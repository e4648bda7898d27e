#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "itwin/v1/spec.pb.h"

namespace itwin::client {

// A local file that a job needs.
struct LocalFile {
  std::string path;    // on this machine
  std::string target;  // in the job's working directory
  std::string sha256;
  int64_t size_bytes = 0;
};

// Told with (path, bytes hashed, size).
using OnHashed = std::function<void(const std::string&, int64_t, int64_t)>;

// Hashes every local file that the spec names, enters it in `inputs` and rewrites the reference. Returns the files, one
// per hash. kInvalidArgument names field and path: for a file that is not there, a directory, or two files that would lie
// in one place.
absl::StatusOr<std::vector<LocalFile>> PlaceLocalFiles(v1::JobSpec* spec, const std::string& base_directory,
                                                       const OnHashed& on_hashed);

}  // namespace itwin::client

#pragma once

#include <vector>

#include "absl/status/status.h"
#include "client/src/placement.h"
#include "client/src/retry.h"
#include "itwin/client.h"

// Artifacts up and down, resumed as long as there is progress. Blocking, in the caller's thread.
namespace itwin::client {

// Uploads those of `files` that the gateway does not have. kDataLoss when a file changed meanwhile.
absl::Status UploadFiles(Connection& connection, const std::vector<LocalFile>& files, const OnProgress& progress,
                         const Pacing& pacing);

// See Client::Download.
absl::Status DownloadFile(Connection& connection, const v1::OutputFile& file, const std::string& path,
                          const OnProgress& progress, const Pacing& pacing);

}  // namespace itwin::client

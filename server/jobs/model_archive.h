#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "itwin/v1/spec.pb.h"
#include "server/artifacts/blob_store.h"

namespace itwin::server {

// Full names ("aten::add.Tensor") of the operators that a model archive (docs/models.md) says it uses: those of its graph, or
// of its manifest for a script. Reads the header alone. kInvalidArgument saying why it is no archive.
absl::StatusOr<std::vector<std::string>> OperatorsOfArchive(const BlobStore::Reader& reader);

// Whether operators may be used at sites: the worker's allow-list, by base name. Those of namespaces other than LibTorch's own
// are the site's to decide and pass here. kInvalidArgument that names each one that may not.
absl::Status CheckOperators(const std::vector<std::string>& operators);

// Those of a job whose model is an archive among its inputs, else none; a file that lies at the site is the worker's to check.
absl::StatusOr<std::vector<std::string>> OperatorsOfJob(const BlobStore& blobs, const v1::JobSpec& spec);

}  // namespace itwin::server

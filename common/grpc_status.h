#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace itwin {

// The codes are the same, number for number; messages are carried over, cut at 4 KiB because gRPC
// sends them in a header.
grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

}  // namespace itwin

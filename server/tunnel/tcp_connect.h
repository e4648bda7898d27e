#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/files.h"
#include "server/tunnel/interrupt.h"

namespace itwin::server {

// A connected, non-blocking TCP socket without Nagle's delay. Every address of the name is tried, each with its share of
// the time. kUnavailable: no such name, or nobody answers.
absl::StatusOr<FileDescriptor> ConnectTcp(const std::string& host, int port, absl::Time deadline,
                                         const Interrupt* interrupt);

}  // namespace itwin::server

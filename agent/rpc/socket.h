#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/files.h"

// The agent's Unix socket.
namespace itwin::agent {

// Where it can lie: `<root>/run/<host>/agent.sock`, or, when that is too long for a socket's address or on a shared
// file system (whose other hosts would see a socket that leads nowhere), a private directory of this user in
// $XDG_RUNTIME_DIR or /tmp. The directory is made, 0700, and refused when it is not ours alone.
absl::StatusOr<std::string> PrepareSocketPath(const std::string& root);

// Listens there; an old socket of that name is replaced (the root's lock says that nobody uses it).
absl::StatusOr<FileDescriptor> ListenUnix(const std::string& path);
absl::StatusOr<FileDescriptor> ConnectUnix(const std::string& path);

// Whether the process at the other end belongs to our user.
bool PeerIsOurUser(int fd);

}  // namespace itwin::agent

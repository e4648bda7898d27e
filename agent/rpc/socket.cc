#include "agent/rpc/socket.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "agent/follow_loop.h"
#include "agent/scheduler/process_tree.h"
#include "common/sha256.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

constexpr size_t kMaxSocketPath = sizeof(sockaddr_un::sun_path) - 1;
constexpr int kBacklog = 128;

absl::Status CheckPrivate(const std::string& directory) {
  struct stat info;
  if (lstat(directory.c_str(), &info) != 0) return ErrnoStatus(errno, directory);
  if (!S_ISDIR(info.st_mode) || info.st_uid != geteuid()) {
    return absl::PermissionDeniedError(absl::StrCat(directory, " is not a directory of ours; remove it"));
  }
  if ((info.st_mode & 077) != 0 && chmod(directory.c_str(), 0700) != 0) return ErrnoStatus(errno, directory);
  return absl::OkStatus();
}

sockaddr_un AddressOf(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  memcpy(address.sun_path, path.data(), std::min(path.size(), kMaxSocketPath));
  return address;
}

}  // namespace

absl::StatusOr<std::string> PrepareSocketPath(const std::string& root) {
  std::string directory = absl::StrCat(root, "/run/", HostName());
  const std::string name = "/agent.sock";
  if (directory.size() + name.size() > kMaxSocketPath || IsSharedFileSystem(root)) {
    const char* runtime = getenv("XDG_RUNTIME_DIR");
    const std::string tag = Sha256Hex(root).substr(0, 16);
    directory = runtime != nullptr && runtime[0] == '/' && access(runtime, W_OK) == 0
                    ? absl::StrCat(runtime, "/itwin-", tag)
                    : absl::StrCat("/tmp/itwin-", geteuid(), "-", tag);
    if (directory.size() + name.size() > kMaxSocketPath) directory = absl::StrCat("/tmp/itwin-", geteuid(), "-", tag);
  }
  ITWIN_RETURN_IF_ERROR(MakeDirectories(directory));
  ITWIN_RETURN_IF_ERROR(CheckPrivate(directory));
  return directory + name;
}

absl::StatusOr<FileDescriptor> ListenUnix(const std::string& path) {
  FileDescriptor fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return ErrnoStatus(errno, "socket");
  unlink(path.c_str());
  const sockaddr_un address = AddressOf(path);
  if (bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      chmod(path.c_str(), 0600) != 0 || listen(fd.get(), kBacklog) != 0) {
    return ErrnoStatus(errno, path);
  }
  return fd;
}

absl::StatusOr<FileDescriptor> ConnectUnix(const std::string& path) {
  if (path.empty() || path.size() > kMaxSocketPath) {
    return absl::InvalidArgumentError(absl::StrCat("'", path, "' cannot be a socket"));
  }
  FileDescriptor fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return ErrnoStatus(errno, "socket");
  const sockaddr_un address = AddressOf(path);
  int result;
  do {
    result = connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  } while (result != 0 && errno == EINTR);
  if (result != 0) return ErrnoStatus(errno, path);
  return fd;
}

bool PeerIsOurUser(int fd) {
  ucred peer{};
  socklen_t size = sizeof peer;
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

}  // namespace itwin::agent

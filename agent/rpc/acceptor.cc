#include "agent/rpc/acceptor.h"

#include <fcntl.h>
#include <grpcpp/server_posix.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

#include "agent/rpc/socket.h"
#include "common/check.h"
#include "common/log.h"

namespace itwin::agent {
namespace {
constexpr size_t kMaxConnections = 256;
}

Acceptor::Acceptor(FileDescriptor listener, grpc::Server* server)
    : listener_(std::move(listener)), server_(server), stop_(eventfd(0, EFD_CLOEXEC)) {
  ITWIN_CHECK(stop_.valid());
}

Acceptor::~Acceptor() { Stop(); }

void Acceptor::Start() { thread_ = std::thread([this] { Run(); }); }

void Acceptor::Stop() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  ITWIN_CHECK(write(stop_.get(), &one, sizeof one) == sizeof one);
  thread_.join();
  listener_.Reset();
}

void Acceptor::Run() {
  while (true) {
    std::vector<pollfd> entries = {{stop_.get(), POLLIN, 0},
                                   {open_.size() < kMaxConnections ? listener_.get() : -1, POLLIN, 0}};
    for (const FileDescriptor& fd : open_) entries.push_back({fd.get(), POLLRDHUP, 0});
    poll(entries.data(), entries.size(), -1);
    if (entries[0].revents != 0) return;
    for (size_t i = entries.size(); i-- > 2;) {
      if (entries[i].revents != 0) open_.erase(open_.begin() + static_cast<std::ptrdiff_t>(i - 2));
    }
    if (entries[1].revents != 0) Accept();
    connections_ = static_cast<int>(open_.size());
  }
}

void Acceptor::Accept() {
  FileDescriptor fd(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!fd.valid()) {
    if (errno == EMFILE || errno == ENFILE || errno == ENOMEM) poll(nullptr, 0, 100);  // do not spin on a full table
    return;
  }
  if (!PeerIsOurUser(fd.get())) {
    log::Warn("a connection of another user was refused");
    return;
  }
  FileDescriptor watched(fcntl(fd.get(), F_DUPFD_CLOEXEC, 3));
  if (!watched.valid()) return;
  open_.push_back(std::move(watched));
  grpc::AddInsecureChannelFromFd(server_, fd.Release());
}

}  // namespace itwin::agent

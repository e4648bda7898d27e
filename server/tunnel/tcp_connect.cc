#include "server/tunnel/tcp_connect.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

using Address = std::pair<sockaddr_storage, socklen_t>;

// A look-up of one name. getaddrinfo cannot be interrupted, so it has a thread that outlives us if need be; never two for
// the same name at a time.
class Lookup {
 public:
  static absl::StatusOr<std::vector<Address>> Find(const std::string& host, int port, absl::Time deadline,
                                                   const Interrupt* interrupt) {
    if (const auto numeric = Ask(host, AI_NUMERICHOST); numeric.ok()) return WithPort(*numeric, port);
    std::shared_ptr<Lookup> lookup;
    {
      static absl::Mutex mu(absl::kConstInit);
      static auto* const under_way = new std::map<std::string, std::weak_ptr<Lookup>>();
      absl::MutexLock lock(&mu);
      lookup = (*under_way)[host].lock();
      if (lookup && lookup->done()) lookup = nullptr;
      if (!lookup) {
        const int event = eventfd(0, EFD_CLOEXEC);
        if (event < 0) return ErrnoStatus(errno, "eventfd");
        lookup = std::make_shared<Lookup>(FileDescriptor(event));
        for (auto it = under_way->begin(); it != under_way->end();) {
          it = it->second.expired() ? under_way->erase(it) : std::next(it);
        }
        (*under_way)[host] = lookup;
        std::thread([lookup, host] { lookup->Finish(Ask(host, 0)); }).detach();
      }
    }
    while (!lookup->done()) {
      std::vector<pollfd> entries = {{lookup->done_.get(), POLLIN, 0}};
      const absl::Status waited = interrupt->Poll(&entries, deadline);
      if (waited.code() == absl::StatusCode::kDeadlineExceeded) {
        return absl::UnavailableError(absl::StrCat("the name '", host, "' was not resolved in time"));
      }
      ITWIN_RETURN_IF_ERROR(waited);
    }
    absl::MutexLock lock(&lookup->mu_);
    if (!lookup->result_->ok()) return lookup->result_->status();
    return WithPort(**lookup->result_, port);
  }

  explicit Lookup(FileDescriptor done) : done_(std::move(done)) {}

 private:
  static absl::StatusOr<std::vector<Address>> Ask(const std::string& host, int flags) {
    addrinfo hints = {};
    hints.ai_flags = flags;
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    const int code = getaddrinfo(host.c_str(), nullptr, &hints, &found);
    if (code != 0) {
      return absl::UnavailableError(absl::StrCat("the name '", host, "' cannot be resolved: ",
                                                 code == EAI_SYSTEM ? strerror(errno) : gai_strerror(code)));
    }
    std::vector<Address> addresses;
    for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
      Address address = {};
      memcpy(&address.first, one->ai_addr, std::min<size_t>(one->ai_addrlen, sizeof address.first));
      address.second = one->ai_addrlen;
      addresses.push_back(address);
    }
    freeaddrinfo(found);
    return addresses;
  }
  static std::vector<Address> WithPort(std::vector<Address> addresses, int port) {
    for (Address& address : addresses) {
      const uint16_t net = htons(static_cast<uint16_t>(port));
      if (address.first.ss_family == AF_INET) reinterpret_cast<sockaddr_in*>(&address.first)->sin_port = net;
      if (address.first.ss_family == AF_INET6) reinterpret_cast<sockaddr_in6*>(&address.first)->sin6_port = net;
    }
    return addresses;
  }
  void Finish(absl::StatusOr<std::vector<Address>> result) {
    absl::MutexLock lock(&mu_);
    result_ = std::move(result);
    const uint64_t one = 1;
    ssize_t ignored = write(done_.get(), &one, sizeof one);
    (void)ignored;
  }
  bool done() const {
    absl::MutexLock lock(&mu_);
    return result_.has_value();
  }

  const FileDescriptor done_;
  mutable absl::Mutex mu_;
  std::optional<absl::StatusOr<std::vector<Address>>> result_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

absl::StatusOr<FileDescriptor> ConnectTcp(const std::string& host, int port, absl::Time deadline,
                                         const Interrupt* interrupt) {
  ITWIN_ASSIGN_OR_RETURN(const std::vector<Address> addresses, Lookup::Find(host, port, deadline, interrupt));
  absl::Status last = absl::UnavailableError(absl::StrCat("the name '", host, "' has no address"));
  for (size_t i = 0; i < addresses.size(); ++i) {
    const auto& [address, size] = addresses[i];
    FileDescriptor fd(socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd.valid()) {
      last = ErrnoStatus(errno, "socket");
      continue;
    }
    const int on = 1;
    setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    int error = connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0 ? 0 : errno;
    if (error == EINPROGRESS) {
      // An address that does not answer leaves time for the others.
      const absl::Time now = absl::Now();
      const absl::Time until = now + (deadline - now) / static_cast<int64_t>(addresses.size() - i);
      std::vector<pollfd> entries = {{fd.get(), POLLOUT, 0}};
      absl::Status waited;
      while ((waited = interrupt->Poll(&entries, until)).ok() && entries[0].revents == 0) {
      }
      if (waited.code() == absl::StatusCode::kCancelled) return waited;
      socklen_t length = sizeof error;
      getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
      if (!waited.ok()) error = ETIMEDOUT;
    }
    if (error == 0) return fd;
    last = absl::UnavailableError(strerror(error));
  }
  return last;
}

}  // namespace itwin::server

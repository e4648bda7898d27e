#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <list>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/check.h"
#include "common/files.h"

namespace itwin::testing {

// A link to 127.0.0.1:`target` that can be harmed, on a port of its own.
class TcpProxy {
 public:
  explicit TcpProxy(int target) : target_(target), listener_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    sockaddr_in address = Loopback(0);
    socklen_t size = sizeof address;
    ITWIN_CHECK(bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
    ITWIN_CHECK(listen(listener_.get(), 64) == 0);
    ITWIN_CHECK(getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Run(); });
  }
  ~TcpProxy() {
    Set(Mode::kStop);
    thread_.join();
  }
  int port() const { return port_; }
  // Connections that were taken so far, in whatever mode.
  int taken() const { return taken_; }

  void Pass() { Set(Mode::kPass); }
  // Connections are reset, new ones closed at once.
  void Cut() { Set(Mode::kCut); }
  // Nothing passes and nobody is told; new connections are taken and stay silent.
  void Silence() { Set(Mode::kSilent); }

 private:
  enum class Mode { kPass, kCut, kSilent, kStop };
  struct Pair {
    FileDescriptor side[2];
    std::string waiting[2];  // for that side
    bool ended[2] = {false, false};
    bool broken = false;
  };

  static sockaddr_in Loopback(int port) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
  }
  void Set(Mode mode) {
    absl::MutexLock lock(&mu_);
    mode_ = mode;
    const uint64_t one = 1;
    ITWIN_CHECK(write(wake_.get(), &one, sizeof one) == sizeof one);
    seen_ = false;
    mu_.Await(absl::Condition(&seen_));  // in force when this returns
  }
  static void Reset(Pair* pair) {
    for (const FileDescriptor& side : pair->side) {
      const linger now{1, 0};
      setsockopt(side.get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
  }

  void Run() {
    std::list<Pair> pairs;
    while (true) {
      Mode mode;
      {
        absl::MutexLock lock(&mu_);
        mode = mode_;
        seen_ = true;
      }
      if (mode == Mode::kStop || mode == Mode::kCut) {
        for (Pair& pair : pairs) Reset(&pair);
        pairs.clear();
      }
      if (mode == Mode::kStop) return;
      std::vector<pollfd> entries = {{wake_.get(), POLLIN, 0}, {listener_.get(), POLLIN, 0}};
      for (const Pair& pair : pairs) {
        for (int i = 0; i < 2; ++i) {
          short events = 0;
          if (!pair.ended[i] && pair.waiting[1 - i].empty()) events |= POLLIN;
          if (!pair.waiting[i].empty()) events |= POLLOUT;
          entries.push_back({mode == Mode::kSilent || events == 0 ? -1 : pair.side[i].get(), events, 0});
        }
      }
      poll(entries.data(), entries.size(), -1);
      uint64_t ignored;
      while (read(wake_.get(), &ignored, sizeof ignored) > 0) {
      }
      size_t at = 2;
      for (Pair& pair : pairs) {
        for (int i = 0; i < 2; ++i, ++at) {
          if (entries[at].fd < 0 || entries[at].revents == 0) continue;
          if ((entries[at].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !pair.ended[i] && pair.waiting[1 - i].empty()) {
            char buffer[1 << 16];
            const ssize_t got = recv(pair.side[i].get(), buffer, sizeof buffer, MSG_DONTWAIT);
            if (got > 0) pair.waiting[1 - i].assign(buffer, static_cast<size_t>(got));
            if (got == 0) {
              pair.ended[i] = true;
              shutdown(pair.side[1 - i].get(), SHUT_WR);
            }
            if (got < 0 && errno != EAGAIN) pair.broken = true;
          }
        }
        for (int i = 0; i < 2; ++i) {
          std::string& waiting = pair.waiting[i];
          while (!waiting.empty()) {
            const ssize_t sent = send(pair.side[i].get(), waiting.data(), waiting.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
            if (sent < 0 && errno != EAGAIN) pair.broken = true;
            if (sent <= 0) break;
            waiting.erase(0, static_cast<size_t>(sent));
          }
        }
      }
      pairs.remove_if([](Pair& pair) {
        if (pair.broken) Reset(&pair);
        return pair.broken || (pair.ended[0] && pair.ended[1]);
      });
      if (entries[1].revents != 0) {
        FileDescriptor taken(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        if (taken.valid()) ++taken_;
        if (!taken.valid() || mode == Mode::kCut) continue;
        FileDescriptor onward(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        const sockaddr_in address = Loopback(target_);
        if (connect(onward.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) continue;
        pairs.emplace_back();
        pairs.back().side[0] = std::move(taken);
        pairs.back().side[1] = std::move(onward);
      }
    }
  }

  const int target_;
  const FileDescriptor listener_;
  const FileDescriptor wake_;
  int port_ = 0;
  std::atomic<int> taken_{0};
  absl::Mutex mu_;
  Mode mode_ ABSL_GUARDED_BY(mu_) = Mode::kPass;
  bool seen_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace itwin::testing

#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

// Bytes over a socket that does not block, for tests: with a deadline instead of waiting for ever.
namespace itwin::testing {

// Waits for the socket; false at the deadline.
inline bool Ready(int fd, short events, int timeout_ms = 30'000) {
  pollfd entry{fd, events, 0};
  return poll(&entry, 1, timeout_ms) == 1;
}

// All of it; false when the socket takes no more.
inline bool Send(int fd, absl::string_view bytes) {
  while (!bytes.empty()) {
    if (!Ready(fd, POLLOUT)) return false;
    const ssize_t sent = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return false;
    if (sent > 0) bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

// Up to `count` bytes; fewer at the end of the stream.
inline std::string Receive(int fd, size_t count) {
  std::string out;
  std::vector<char> buffer(1 << 18);
  while (out.size() < count && Ready(fd, POLLIN)) {
    const ssize_t got = recv(fd, buffer.data(), std::min(buffer.size(), count - out.size()), 0);
    if (got < 0 && errno == EAGAIN) continue;
    if (got <= 0) break;
    out.append(buffer.data(), static_cast<size_t>(got));
  }
  return out;
}

}  // namespace itwin::testing

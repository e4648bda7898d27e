#include "server/tunnel/interrupt.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/time/clock.h"

namespace itwin::server {

absl::Status Interrupt::Cancelled() { return absl::CancelledError("the connection was given up on request"); }

absl::Status Interrupt::Poll(std::vector<pollfd>* entries, absl::Time deadline) const {
  entries->push_back({event_.get(), POLLIN, 0});
  const absl::Duration left = deadline - absl::Now();
  const int timeout_ms = left <= absl::ZeroDuration() ? 0
                         : left > absl::Hours(1)      ? 3'600'000
                                                      : static_cast<int>(absl::ToInt64Milliseconds(left)) + 1;
  const int ready = poll(entries->data(), entries->size(), timeout_ms);
  const int error = errno;
  const bool interrupted = ready > 0 && entries->back().revents != 0;
  entries->pop_back();
  if (interrupted) return Cancelled();
  if (ready < 0 && error != EINTR) return ErrnoStatus(error, "poll");
  if (ready == 0 && absl::Now() >= deadline) return absl::DeadlineExceededError("no answer in time");
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<Interrupt>> Interrupt::Create() {
  FileDescriptor event(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event.valid()) return ErrnoStatus(errno, "eventfd");
  return std::shared_ptr<Interrupt>(new Interrupt(std::move(event)));
}

void Interrupt::Set() {
  absl::MutexLock lock(&mu_);
  if (set_) return;
  set_ = true;
  const uint64_t one = 1;
  ssize_t ignored = write(event_.get(), &one, sizeof one);
  (void)ignored;
  if (guarded_.valid()) shutdown(guarded_.get(), SHUT_RDWR);
}

bool Interrupt::is_set() const {
  absl::MutexLock lock(&mu_);
  return set_;
}

void Interrupt::Guard(int fd) {
  absl::MutexLock lock(&mu_);
  guarded_.Reset();
  if (fd < 0) return;
  guarded_ = FileDescriptor(fcntl(fd, F_DUPFD_CLOEXEC, 3));
  if (set_) shutdown(fd, SHUT_RDWR);
}

}  // namespace itwin::server

#include "server/tunnel/process_tunnel.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <optional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/status_macros.h"
#include "common/subprocess.h"

namespace itwin::server {
namespace {

std::string DescribeExit(const ExitStatus& exit) {
  if (exit.signal != 0) return absl::StrCat("it was ended by signal ", exit.signal, " (", strsignal(exit.signal), ")");
  return absl::StrCat("it ended with exit code ", exit.exit_code);
}

class ProcessTunnelStream : public TunnelStream {
 public:
  ProcessTunnelStream(std::string program, FileDescriptor socket, FileDescriptor guard, FileDescriptor errors,
                      FileDescriptor wake, Subprocess child, absl::Duration grace)
      : program_(std::move(program)),
        grace_(grace),
        guard_(std::move(guard)),
        errors_(std::move(errors)),
        wake_(std::move(wake)),
        child_(std::move(child)),
        socket_(std::move(socket)),
        monitor_([this] { Monitor(); }) {}

  ~ProcessTunnelStream() override { Close(); }

  FileDescriptor TakeSocket() override { return std::move(socket_); }

  std::string Diagnostics() const override {
    absl::MutexLock lock(&mu_);
    if (!exit_) return errors_tail_;
    return absl::StrCat(errors_tail_, errors_tail_.empty() || errors_tail_.back() == '\n' ? "" : "\n", program_, ": ",
                        DescribeExit(*exit_));
  }

  bool alive() const override {
    absl::MutexLock lock(&mu_);
    return !exit_.has_value();
  }

  void Close() override {
    absl::MutexLock lock(&close_mu_);
    if (!monitor_.joinable()) return;
    // Both directions, at the socket itself: the child sees end of file even while gRPC holds the descriptor.
    shutdown(guard_.get(), SHUT_RDWR);
    const uint64_t one = 1;
    ssize_t ignored = write(wake_.get(), &one, sizeof one);
    (void)ignored;
    monitor_.join();
    socket_.Reset();
    guard_.Reset();
    errors_.Reset();
  }

 private:
  // Owns the child: keeps the tail of its standard error, and notices its end.
  void Monitor() {
    const FileDescriptor pidfd(static_cast<int>(syscall(SYS_pidfd_open, child_.pid(), 0)));
    bool closing = false;
    while (!closing) {
      pollfd entries[3] = {{errors_.get(), POLLIN, 0}, {pidfd.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
      // Without pidfd (an old kernel) the exit is noticed by looking now and then.
      poll(entries, 3, pidfd.valid() ? -1 : 100);
      if (entries[0].revents != 0 && !ReadErrors()) errors_.Reset();
      closing = entries[2].revents != 0;
      if (child_.Poll()) break;
    }
    std::optional<ExitStatus> exit = child_.Poll();
    if (!exit) exit = child_.Wait(absl::Now() + grace_);
    if (!exit) {
      child_.Kill(SIGTERM, /*group=*/true);
      exit = child_.Wait(absl::Now() + grace_);
    }
    if (!exit) {
      child_.Kill(SIGKILL, /*group=*/true);
      exit = child_.Wait(absl::InfiniteFuture());
    }
    while (errors_.valid() && ReadErrors()) {
    }
    // A grandchild may hold the far end; the stream is over all the same.
    shutdown(guard_.get(), SHUT_RDWR);
    absl::MutexLock lock(&mu_);
    exit_ = exit;
  }

  // Takes what is there; false at the end of the pipe or when there is nothing more now.
  bool ReadErrors() {
    char buffer[4096];
    const ssize_t got = read(errors_.get(), buffer, sizeof buffer);
    if (got < 0) return errno == EINTR;
    if (got == 0) return false;
    absl::MutexLock lock(&mu_);
    errors_tail_.append(buffer, static_cast<size_t>(got));
    constexpr size_t kKeep = kMaxDiagnosticsBytes - 512;  // room for how it ended
    if (errors_tail_.size() > kKeep) {
      errors_tail_.erase(0, errors_tail_.size() - kKeep);
      const size_t line = errors_tail_.find('\n');
      if (line != std::string::npos && line + 1 < errors_tail_.size()) errors_tail_.erase(0, line + 1);
    }
    return true;
  }

  const std::string program_;
  const absl::Duration grace_;
  FileDescriptor guard_;   // a duplicate of the socket, to shut it down with
  FileDescriptor errors_;  // touched by the monitor thread, and after its end
  FileDescriptor wake_;
  Subprocess child_;       // monitor thread only
  FileDescriptor socket_;  // until taken

  absl::Mutex close_mu_;
  mutable absl::Mutex mu_;
  std::string errors_tail_ ABSL_GUARDED_BY(mu_);
  std::optional<ExitStatus> exit_ ABSL_GUARDED_BY(mu_);

  std::thread monitor_;  // last: everything it uses exists before it starts
};

}  // namespace

ProcessTunnel::ProcessTunnel(ProcessTunnelOptions options) : options_(std::move(options)) {}

absl::StatusOr<std::unique_ptr<TunnelStream>> ProcessTunnel::Open(absl::Time deadline) {
  if (cancelled_) return absl::CancelledError("the gateway is stopping");
  if (absl::Now() >= deadline) return absl::DeadlineExceededError("no time left to start the connection");
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return ErrnoStatus(errno, "socketpair");
  FileDescriptor ours(pair[0]), theirs(pair[1]);
  FileDescriptor guard(fcntl(ours.get(), F_DUPFD_CLOEXEC, 3));
  int errors[2];
  if (!guard.valid() || pipe2(errors, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  FileDescriptor errors_read(errors[0]), errors_write(errors[1]);
  FileDescriptor wake(eventfd(0, EFD_CLOEXEC));
  if (!wake.valid()) return ErrnoStatus(errno, "eventfd");
  // Ours alone does not block: the flag belongs to each end of the pair.
  if (fcntl(ours.get(), F_SETFL, O_NONBLOCK) != 0 || fcntl(errors_read.get(), F_SETFL, O_NONBLOCK) != 0) {
    return ErrnoStatus(errno, "fcntl");
  }
  SubprocessOptions child;
  child.argv = options_.argv;
  child.env = options_.env;
  child.stdin_fd = theirs.get();
  child.stdout_fd = theirs.get();
  child.stderr_fd = errors_write.get();
  child.new_session = true;  // a Ctrl-C at the gateway's terminal is not for it
  ITWIN_ASSIGN_OR_RETURN(Subprocess process, Subprocess::Start(child));
  return std::unique_ptr<TunnelStream>(
      new ProcessTunnelStream(options_.argv[0], std::move(ours), std::move(guard), std::move(errors_read),
                              std::move(wake), std::move(process), options_.grace));
}

std::string ProcessTunnel::description() const { return absl::StrJoin(options_.argv, " "); }

}  // namespace itwin::server

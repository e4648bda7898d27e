#include "agent/rpc/connect.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <optional>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "agent/rpc/root_lock.h"
#include "agent/rpc/socket.h"
#include "common/status_macros.h"
#include "common/subprocess.h"

namespace itwin::agent {
namespace {

constexpr size_t kBufferBytes = 256 << 10;
constexpr int kLookMs = 5;
constexpr int kGreetingMs = 5000;
constexpr int64_t kLastWords = 2000;

// Nothing: none lives here. One that lives elsewhere is asked to leave by the daemon that is started here.
absl::StatusOr<std::optional<FileDescriptor>> TryConnect(const std::string& root) {
  const std::optional<OwnerRecord> owner = ReadOwnerRecord(root);
  if (!owner || !IsHere(*owner) || !IsAlive(owner->process)) return std::optional<FileDescriptor>();
  absl::StatusOr<FileDescriptor> socket = ConnectUnix(owner->socket);
  if (!socket.ok()) return std::optional<FileDescriptor>();  // about to go
  if (!PeerIsOurUser(socket->get())) {
    return absl::PermissionDeniedError(absl::StrCat(owner->socket, " belongs to another user"));
  }
  // A process that is just dying may still take connections. The agent's server speaks first (HTTP/2 settings).
  pollfd entry{socket->get(), POLLIN, 0};
  char first;
  if (poll(&entry, 1, kGreetingMs) != 1 || recv(socket->get(), &first, 1, MSG_PEEK) != 1) {
    return std::optional<FileDescriptor>();
  }
  return std::optional<FileDescriptor>(*std::move(socket));
}

std::string LastWords(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, 64 << 20);
  if (!text.ok()) return "";
  return text->substr(text->size() > kLastWords ? text->size() - kLastWords : 0);
}

}  // namespace

absl::StatusOr<FileDescriptor> ConnectToAgent(const ConnectOptions& options) {
  const absl::Time deadline = absl::Now() + options.limit;
  ITWIN_RETURN_IF_ERROR(MakeDirectories(options.root));
  ITWIN_ASSIGN_OR_RETURN(std::optional<FileDescriptor> socket, TryConnect(options.root));
  if (socket) return *std::move(socket);

  // One starter at a time; the lock goes with this process, however it ends.
  ITWIN_ASSIGN_OR_RETURN(const FileDescriptor starter, OpenFile(options.root + "/start.lock", O_RDWR | O_CREAT));
  // Where there are no file locks, several may start one: the lease lets one of them live.
  const bool no_locks = getenv("ITWIN_TEST_NO_FLOCK") != nullptr;
  while (!no_locks && flock(starter.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) break;
    if (absl::Now() > deadline) return absl::DeadlineExceededError("another process is starting the agent and is not done");
    poll(nullptr, 0, kLookMs);
  }
  const std::string log_path = options.root + "/agent.log";
  std::optional<Subprocess> daemon;
  while (absl::Now() < deadline) {
    ITWIN_ASSIGN_OR_RETURN(socket, TryConnect(options.root));
    if (socket) return *std::move(socket);
    if (!daemon) {
      SubprocessOptions serve;
      serve.argv = {options.agent_program, "serve", "--detached", "--root", options.root};
      serve.argv.insert(serve.argv.end(), options.serve_flags.begin(), options.serve_flags.end());
      serve.new_session = true;
      ITWIN_ASSIGN_OR_RETURN(const FileDescriptor log_file, OpenFile(log_path, O_WRONLY | O_CREAT | O_APPEND));
      serve.stdout_fd = serve.stderr_fd = log_file.get();
      ITWIN_ASSIGN_OR_RETURN(daemon, Subprocess::Start(serve));
    }
    if (const std::optional<ExitStatus> exit = daemon->Poll()) {
      // 3: another one serves this root, perhaps for a last moment; then the next try is ours.
      if (exit->exit_code != 3) {
        return absl::UnavailableError(absl::StrCat("the agent did not start (exit code ", exit->exit_code, ", signal ",
                                                   exit->signal, "): ", LastWords(log_path)));
      }
      daemon.reset();
    }
    poll(nullptr, 0, kLookMs);
  }
  return absl::DeadlineExceededError(absl::StrCat("the agent was not ready after ", absl::FormatDuration(options.limit),
                                                  "; see ", log_path));
}

namespace {

// One direction: bytes that were read and not yet written.
struct Pipe {
  int from, to;
  std::string buffer = std::string(kBufferBytes, '\0');
  size_t begin = 0, end = 0;
  bool source_ended = false;

  bool empty() const { return begin == end; }
  // False: the source is broken.
  bool Fill() {
    const ssize_t got = read(from, buffer.data(), buffer.size());
    if (got > 0) {
      begin = 0;
      end = static_cast<size_t>(got);
      return true;
    }
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    source_ended = true;
    return got == 0 || errno == ECONNRESET || errno == EIO;
  }
  // False: nobody takes it any more.
  bool Drain() {
    const ssize_t put = write(to, buffer.data() + begin, end - begin);
    if (put >= 0) begin += static_cast<size_t>(put);
    return put >= 0 || errno == EAGAIN || errno == EINTR;
  }
};

}  // namespace

absl::Status Relay(int in, int out, int socket) {
  const int fds[3] = {in, out, socket};
  int flags[3];
  for (int i = 0; i < 3; ++i) {
    flags[i] = fcntl(fds[i], F_GETFL);
    fcntl(fds[i], F_SETFL, flags[i] | O_NONBLOCK);
  }
  // The descriptions may be shared with whoever started us.
  absl::Cleanup restore = [&] {
    for (int i = 0; i < 3; ++i) fcntl(fds[i], F_SETFL, flags[i]);
  };
  Pipe up{in, socket}, down{socket, out};
  while (true) {
    if (up.source_ended && up.empty()) return absl::OkStatus();
    if (down.source_ended && down.empty()) return absl::OkStatus();
    // Every descriptor is always polled, if only for its hang-up: a caller that dies must not leave us behind.
    pollfd entries[3] = {{in, static_cast<short>(up.empty() ? POLLIN : 0), 0},
                         {out, static_cast<short>(down.empty() ? 0 : POLLOUT), 0},
                         {socket, static_cast<short>((down.empty() && !down.source_ended ? POLLIN : 0) |
                                                     (up.empty() ? 0 : POLLOUT)), 0}};
    if (poll(entries, 3, -1) < 0 && errno != EINTR) return ErrnoStatus(errno, "poll");
    if ((entries[1].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0) return absl::OkStatus();  // nobody reads us
    if (!up.empty() && (entries[0].revents & POLLHUP) != 0 && (entries[0].revents & POLLIN) == 0 &&
        (entries[2].revents & POLLOUT) == 0) {
      return absl::OkStatus();  // the caller is gone, and the agent takes no more
    }
    if (up.empty() && (entries[0].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !up.Fill()) {
      return ErrnoStatus(errno, "read from the caller");
    }
    if (down.empty() && (entries[2].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !down.Fill()) {
      return ErrnoStatus(errno, "read from the agent");
    }
    if (!up.empty() && !up.Drain()) return absl::OkStatus();
    if (!down.empty() && !down.Drain()) return absl::OkStatus();
  }
}

}  // namespace itwin::agent

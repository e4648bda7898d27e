#include "common/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/status_macros.h"

extern char** environ;

namespace itwin {
namespace {

// Names to try, made before the fork: between fork and exec nothing may allocate.
std::vector<std::string> ExecutableCandidates(const std::string& program) {
  if (program.find('/') != std::string::npos) return {program};
  const char* path = getenv("PATH");
  std::vector<std::string> out;
  for (absl::string_view directory : absl::StrSplit(path ? path : "/usr/bin:/bin", ':')) {
    out.push_back(absl::StrCat(directory.empty() ? "." : directory, "/", program));
  }
  return out;
}

std::vector<std::string> MergedEnvironment(const SubprocessOptions& options) {
  std::vector<std::string> out;
  if (!options.clear_env) {
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const absl::string_view text(*entry);
      const absl::string_view key = text.substr(0, text.find('='));
      const bool replaced = std::any_of(options.env.begin(), options.env.end(),
                                        [&](const auto& pair) { return pair.first == key; });
      if (!replaced) out.emplace_back(text);
    }
  }
  for (const auto& [key, value] : options.env) out.push_back(absl::StrCat(key, "=", value));
  return out;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> out;
  for (std::string& s : strings) out.push_back(s.data());
  out.push_back(nullptr);
  return out;
}

int PidfdOpen(pid_t pid) { return static_cast<int>(syscall(SYS_pidfd_open, pid, 0)); }

}  // namespace

absl::StatusOr<Subprocess> Subprocess::Start(const SubprocessOptions& options) {
  if (options.argv.empty() || options.argv[0].empty()) {
    return absl::InvalidArgumentError("a command needs at least the name of a program");
  }
  std::vector<std::string> candidates = ExecutableCandidates(options.argv[0]);
  std::vector<std::string> arguments = options.argv;
  std::vector<std::string> environment = MergedEnvironment(options);
  std::vector<char*> argv = Pointers(arguments);
  std::vector<char*> envp = Pointers(environment);
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor null, OpenFile("/dev/null", O_RDWR));
  const int sources[3] = {options.stdin_fd, options.stdout_fd, options.stderr_fd};

  int report[2];
  if (pipe2(report, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  FileDescriptor report_read(report[0]), report_write(report[1]);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  const pid_t self = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    if (options.die_with_parent && (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != self)) _exit(127);
    // Default handlers and an open mask: what we ignore or block is our business, not the child's.
    for (int s = 1; s < NSIG; ++s) {
      if (s != SIGKILL && s != SIGSTOP) signal(s, SIG_DFL);
    }
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    int fds[3];
    bool good = true;
    for (int i = 0; i < 3 && good; ++i) {
      // Copies above 2 first, so that a source that is itself 0..2 is not overwritten too early.
      fds[i] = fcntl(sources[i] >= 0 ? sources[i] : null.get(), F_DUPFD_CLOEXEC, 3);
      good = fds[i] >= 0;
    }
    for (int i = 0; i < 3 && good; ++i) good = dup2(fds[i], i) >= 0;
    if (good && options.new_session) good = setsid() >= 0;
    if (good && !options.directory.empty()) good = chdir(options.directory.c_str()) == 0;
    int error = errno;
    if (good) {
      error = ENOENT;
      for (const std::string& candidate : candidates) {
        execve(candidate.c_str(), argv.data(), envp.data());
        if (errno != ENOENT && errno != ENOTDIR) error = errno;
      }
    }
    ssize_t ignored = write(report_write.get(), &error, sizeof error);
    (void)ignored;
    _exit(127);
  }
  const int fork_error = errno;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (pid < 0) return ErrnoStatus(fork_error, "fork");
  report_write.Reset();
  int error = 0;
  ssize_t got;
  do {
    got = read(report_read.get(), &error, sizeof error);
  } while (got < 0 && errno == EINTR);
  if (got == sizeof error) {
    waitpid(pid, nullptr, 0);
    return ErrnoStatus(error, absl::StrCat("cannot run '", options.argv[0], "'",
                                           options.directory.empty() ? "" : " in ", options.directory));
  }
  return Subprocess(pid);
}

std::optional<ExitStatus> Subprocess::Poll() {
  if (exit_) return exit_;
  int status = 0;
  const pid_t got = waitpid(pid_, &status, WNOHANG);
  if (got == pid_) {
    exit_ = WIFSIGNALED(status) ? ExitStatus{0, WTERMSIG(status)} : ExitStatus{WEXITSTATUS(status), 0};
  }
  return exit_;
}

std::optional<ExitStatus> Subprocess::Wait(absl::Time deadline) {
  if (std::optional<ExitStatus> exit = Poll()) return exit;
  FileDescriptor pidfd(PidfdOpen(pid_));
  while (true) {
    const absl::Duration left = deadline - absl::Now();
    const int ms = left >= absl::Hours(1) ? 3'600'000
                                          : static_cast<int>(std::max<int64_t>(0, absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1)))));
    pollfd entry{pidfd.get(), POLLIN, 0};
    // Without pidfd (an old kernel) short naps do.
    poll(&entry, pidfd.valid() ? 1 : 0, pidfd.valid() ? ms : std::min(ms, 20));
    if (std::optional<ExitStatus> exit = Poll()) return exit;
    if (absl::Now() >= deadline) return std::nullopt;
  }
}

void Subprocess::Kill(int signal, bool group) {
  if (exit_) return;
  kill(group ? -pid_ : pid_, signal);
}

absl::StatusOr<CommandOutput> RunCommand(SubprocessOptions options, absl::Duration limit, size_t max_output) {
  int out[2], err[2];
  if (pipe2(out, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  FileDescriptor out_read(out[0]), out_write(out[1]);
  if (pipe2(err, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  FileDescriptor err_read(err[0]), err_write(err[1]);
  options.stdout_fd = out_write.get();
  options.stderr_fd = err_write.get();
  options.new_session = true;
  ITWIN_ASSIGN_OR_RETURN(Subprocess child, Subprocess::Start(options));
  out_write.Reset();
  err_write.Reset();

  const absl::Time deadline = absl::Now() + limit;
  CommandOutput result;
  pollfd entries[2] = {{out_read.get(), POLLIN, 0}, {err_read.get(), POLLIN, 0}};
  std::string* sinks[2] = {&result.out, &result.err};
  int open_streams = 2;
  std::vector<char> buffer(1 << 16);
  while (open_streams > 0 && absl::Now() < deadline) {
    const int ready = poll(entries, 2, 200);
    if (ready == 0 && child.Poll()) break;  // a grandchild may keep the pipe open for ever
    for (int i = 0; i < 2; ++i) {
      if (entries[i].fd < 0 || entries[i].revents == 0) continue;
      const ssize_t got = read(entries[i].fd, buffer.data(), buffer.size());
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) {
        entries[i].fd = -1;
        --open_streams;
        continue;
      }
      const size_t room = max_output - std::min(max_output, sinks[i]->size());
      const size_t used = std::min(room, static_cast<size_t>(got));
      sinks[i]->append(buffer.data(), used);
      result.truncated |= used < static_cast<size_t>(got);
    }
  }
  if (std::optional<ExitStatus> exit = child.Wait(deadline)) {
    result.exit = *exit;
    return result;
  }
  child.Kill(SIGKILL, /*group=*/true);
  child.Wait(absl::Now() + absl::Seconds(5));
  return absl::DeadlineExceededError(
      absl::StrCat("'", options.argv[0], "' did not end within ", absl::FormatDuration(limit)));
}

}  // namespace itwin

#include "server/tunnel/ssh_command.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "server/tunnel/shell_quote.h"
#include "server/tunnel/ssh_tunnel.h"

namespace itwin::server {
namespace {

constexpr size_t kUploadChunk = 1 << 20;
constexpr int kUploadTries = 2;    // the second from the beginning, when what was there does not fit
// Exit codes of the upload script: all there but not what was sent, or not all there (that part is kept).
constexpr int kChecksumExit = 97;
constexpr int kIncompleteExit = 98;

// A script for `sh`, whatever the account's own shell is.
absl::StatusOr<std::string> ShellScript(const std::string& script) { return CommandLine({"exec", "sh", "-c", script}); }

bool IsOutOfSpace(absl::string_view text) {
  return absl::StrContains(text, "No space left") || absl::StrContains(absl::AsciiStrToLower(text), "quota");
}

std::string Words(const SshCommandResult& result) {
  const std::string text(absl::StripAsciiWhitespace(result.err.empty() ? result.out : result.err));
  return absl::StrCat(result.signal.empty() ? absl::StrCat("exit code ", result.exit_code) : absl::StrCat("signal ", result.signal),
                      text.empty() ? "" : ": ", text.substr(0, 500));
}

struct There {
  bool complete = false;
  int64_t partial = 0;
};

}  // namespace

absl::StatusOr<SshCommandResult> RunSshCommand(const SshTunnelOptions& options, const std::string& command,
                                               const SshInput& input, absl::Time deadline) {
  ITWIN_ASSIGN_OR_RETURN(const std::unique_ptr<SshTunnel> tunnel, SshTunnel::Create(options));
  ITWIN_ASSIGN_OR_RETURN(const std::unique_ptr<SshStream> stream, tunnel->OpenCommand(command, deadline));
  const FileDescriptor socket = stream->TakeSocket();
  SshCommandResult result;
  std::string pending;
  bool input_ended = false;
  std::vector<char> buffer(1 << 16);
  while (true) {
    if (pending.empty() && !input_ended) {
      if (input) {
        ITWIN_ASSIGN_OR_RETURN(pending, input());
      }
      if (pending.empty()) {
        input_ended = true;
        shutdown(socket.get(), SHUT_WR);
      }
    }
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) return absl::DeadlineExceededError("the command did not end in time");
    pollfd entry{socket.get(), static_cast<short>(pending.empty() ? POLLIN : POLLIN | POLLOUT), 0};
    const int timeout_ms = static_cast<int>(std::min<int64_t>(absl::ToInt64Milliseconds(left) + 1, 60'000));
    if (poll(&entry, 1, timeout_ms) < 0 && errno != EINTR) return ErrnoStatus(errno, "poll");
    if (!pending.empty() && (entry.revents & POLLOUT) != 0) {
      const ssize_t sent = send(socket.get(), pending.data(), pending.size(), MSG_NOSIGNAL);
      if (sent > 0) pending.erase(0, static_cast<size_t>(sent));
      if (sent < 0 && errno != EAGAIN && errno != EINTR) {
        pending.clear();  // it does not read on; that is its own affair
        input_ended = true;
      }
    }
    if ((entry.revents & (POLLIN | POLLHUP | POLLERR)) == 0) continue;
    const ssize_t got = recv(socket.get(), buffer.data(), buffer.size(), 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (got <= 0) break;
    const size_t room = kMaxSshCommandOutput - result.out.size();
    result.out.append(buffer.data(), std::min(room, static_cast<size_t>(got)));
    result.truncated = result.truncated || static_cast<size_t>(got) > room;
  }
  // Its output has ended; the command itself may go on without.
  if (!stream->WaitForEnd(deadline)) return absl::DeadlineExceededError("the command did not end in time");
  const SshExit exit = stream->exit();
  if (!exit.known) return absl::UnavailableError(absl::StrCat("the connection broke: ", stream->Diagnostics()));
  result.exit_code = exit.exit_code;
  result.signal = exit.signal;
  result.err = stream->Diagnostics();
  // The last line of the diagnostics is ours: how it ended.
  const size_t last = result.err.rfind('\n');
  result.err.erase(last == std::string::npos ? 0 : last);
  return result;
}

absl::Status UploadFile(const SshTunnelOptions& options, const std::string& local_path, const std::string& remote_path,
                        unsigned mode, absl::Time deadline,
                        const std::function<void(int64_t sent, int64_t total)>& progress) {
  if (remote_path.empty() || remote_path.back() == '/') {
    return absl::InvalidArgumentError(absl::StrCat("'", remote_path, "' is no name for a file"));
  }
  ITWIN_ASSIGN_OR_RETURN(const std::string sha256, Sha256OfFile(local_path));
  struct stat info;
  if (stat(local_path.c_str(), &info) != 0) return ErrnoStatus(errno, local_path);
  const int64_t total = info.st_size;

  // A path that begins with "-" would be an option.
  const std::string path = remote_path[0] == '/' ? remote_path : absl::StrCat("./", remote_path);
  const std::string directory = path.substr(0, std::max<size_t>(1, path.rfind('/')));
  const std::string partial = absl::StrCat(path, ".part-", sha256.substr(0, 16));
  ITWIN_ASSIGN_OR_RETURN(const std::string quoted_path, QuoteForShell(path));
  ITWIN_ASSIGN_OR_RETURN(const std::string quoted_directory, QuoteForShell(directory));
  ITWIN_ASSIGN_OR_RETURN(const std::string quoted_partial, QuoteForShell(partial));
  const std::string names = absl::StrCat("f=", quoted_path, "; d=", quoted_directory, "; p=", quoted_partial, "; h=", sha256,
                                         "; m=", absl::StrFormat("%o", mode & 07777), "; umask 077; ");
  const auto failed = [&](const SshCommandResult& result) {
    const std::string message = absl::StrCat("sending ", remote_path, ": ", Words(result));
    return IsOutOfSpace(result.err) ? absl::ResourceExhaustedError(message) : absl::FailedPreconditionError(message);
  };

  for (int attempt = 1;; ++attempt) {
    // What is there already?
    ITWIN_ASSIGN_OR_RETURN(
        const std::string look,
        ShellScript(absl::StrCat(names, "if [ -f \"$f\" ] && [ \"$(sha256sum <\"$f\" | cut -c1-64)\" = $h ]; then chmod $m \"$f\" && echo there; "
                                        "elif [ -f \"$p\" ]; then wc -c <\"$p\"; else echo 0; fi")));
    ITWIN_ASSIGN_OR_RETURN(const SshCommandResult looked, RunSshCommand(options, look, nullptr, deadline));
    if (looked.exit_code != 0 || !looked.signal.empty()) return failed(looked);
    // Shells of some accounts greet: the answer is the last line.
    const std::vector<std::string> lines = absl::StrSplit(absl::StripAsciiWhitespace(looked.out), '\n');
    const absl::string_view answer = absl::StripAsciiWhitespace(lines.back());
    if (answer == "there") {
      if (progress) progress(total, total);
      return absl::OkStatus();
    }
    int64_t offset = 0;
    if (!absl::SimpleAtoi(answer, &offset) || offset < 0 || offset > total) offset = 0;

    ITWIN_ASSIGN_OR_RETURN(
        const std::string take,
        ShellScript(absl::StrCat(names, "mkdir -p \"$d\" && cat ", offset > 0 ? ">>" : ">", "\"$p\" || exit 1; [ $(wc -c <\"$p\") -eq ", total, " ] || exit ", kIncompleteExit, "; [ \"$(sha256sum <\"$p\" | cut -c1-64)\" = $h ] || { rm -f \"$p\"; exit ",
                                 kChecksumExit, "; }; chmod $m \"$p\" && { sync \"$p\" 2>/dev/null || :; } && mv -f \"$p\" \"$f\"")));
    int64_t sent = offset;
    const SshInput file = [&]() -> absl::StatusOr<std::string> {
      if (progress) progress(sent, total);
      ITWIN_ASSIGN_OR_RETURN(std::string chunk, ReadFileRange(local_path, sent, kUploadChunk));
      sent += static_cast<int64_t>(chunk.size());
      return chunk;
    };
    ITWIN_ASSIGN_OR_RETURN(const SshCommandResult result, RunSshCommand(options, take, file, deadline));
    if (result.exit_code == 0 && result.signal.empty()) return absl::OkStatus();
    if (result.exit_code != kChecksumExit && result.exit_code != kIncompleteExit) return failed(result);
    if (attempt == kUploadTries) {
      return absl::DataLossError(absl::StrCat("sending ", remote_path, ": what arrives is not what was sent, twice; has the file changed meanwhile?"));
    }
  }
}

}  // namespace itwin::server

#include "server/tunnel/ssh_options.h"

#include <fcntl.h>
#include <unistd.h>

#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/status_macros.h"
#include "common/subprocess.h"
#include "server/tunnel/known_hosts.h"

namespace itwin::server {
namespace {

constexpr size_t kMaxPromptBytes = 2048;  // fits a pipe
constexpr size_t kMaxAnswerBytes = 4096;

bool IsName(absl::string_view text) {
  if (text.empty() || text.size() > 255 || text[0] == '-') return false;
  for (const char c : text) {
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c)) || absl::ascii_isspace(static_cast<unsigned char>(c))) return false;
  }
  return true;
}

absl::Status CheckHost(const SshHost& host, const SshTunnelOptions& options, absl::string_view where) {
  if (!IsName(host.host)) return absl::InvalidArgumentError(absl::StrCat(where, ": '", host.host, "' is no host name"));
  if (host.port < 1 || host.port > 65535) return absl::InvalidArgumentError(absl::StrCat(where, ": ", host.port, " is no port"));
  const std::string& user = host.user.empty() ? options.user : host.user;
  if (!IsName(user)) return absl::InvalidArgumentError(absl::StrCat(where, ": '", user, "' is no user name"));
  return absl::OkStatus();
}

// The prompt as one line without control characters.
std::string OneLine(absl::string_view text) {
  std::string line(text.substr(0, kMaxPromptBytes));
  for (char& c : line) {
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) c = ' ';
  }
  return line;
}

absl::StatusOr<std::string> AskProgram(const std::vector<std::string>& argv, const SshChallenge& challenge,
                                       const SshPrompt& prompt, absl::Time deadline) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
  const FileDescriptor read_end(ends[0]);
  FileDescriptor write_end(ends[1]);
  ITWIN_RETURN_IF_ERROR(WriteAll(write_end.get(), absl::StrCat(OneLine(prompt.text), "\n"), "the program's input"));
  write_end.Reset();
  SubprocessOptions program;
  program.argv = argv;
  program.stdin_fd = read_end.get();
  program.env = {{"ITWIN_SSH_USER", challenge.user},
                 {"ITWIN_SSH_HOST", challenge.host},
                 {"ITWIN_SSH_NAME", OneLine(challenge.name)},
                 {"ITWIN_SSH_INSTRUCTION", OneLine(challenge.instruction)}};
  program.new_session = true;  // it may not ask at the gateway's terminal
  const absl::Duration left = deadline - absl::Now();
  if (left <= absl::ZeroDuration()) return absl::DeadlineExceededError("no time left to ask for an answer");
  const absl::StatusOr<CommandOutput> output = RunCommand(std::move(program), left, kMaxAnswerBytes);
  if (!output.ok()) return output.status();
  if (output->exit.signal != 0 || output->exit.exit_code != 0) {
    // What it printed may be half an answer; its standard error is for people.
    return absl::UnauthenticatedError(
        absl::StrCat(argv[0], " gave no answer to '", OneLine(prompt.text), "' (",
                     output->exit.signal != 0 ? absl::StrCat("signal ", output->exit.signal)
                                              : absl::StrCat("exit code ", output->exit.exit_code),
                     ")", output->err.empty() ? "" : ": ", OneLine(absl::StripAsciiWhitespace(output->err))));
  }
  return output->out.substr(0, output->out.find_first_of("\r\n"));
}

}  // namespace

absl::Status CheckSshOptions(const SshTunnelOptions& options) {
  if (options.hosts.empty()) return absl::InvalidArgumentError("hosts: at least one login node is needed");
  for (const SshHost& host : options.hosts) ITWIN_RETURN_IF_ERROR(CheckHost(host, options, "hosts"));
  for (const SshHost& host : options.jump) ITWIN_RETURN_IF_ERROR(CheckHost(host, options, "jump"));
  if (absl::StrContains(options.command, '\0')) return absl::InvalidArgumentError("command: holds a NUL byte");
  for (const std::string& fingerprint : options.fingerprints) {
    if (!IsFingerprint(fingerprint)) {
      return absl::InvalidArgumentError(absl::StrCat("fingerprints: '", fingerprint, "' is none; they look like 'SHA256:' and 43 letters, as ",
                                                     "`ssh-keygen -lf KEY.pub` shows them"));
    }
  }
  if (!options.passphrase_file.empty() && options.identity_file.empty()) {
    return absl::InvalidArgumentError("passphrase_file: there is no identity_file that it could be for");
  }
  if (!options.certificate_file.empty() && options.identity_file.empty()) {
    return absl::InvalidArgumentError("certificate_file: there is no identity_file that it could be for");
  }
  if (options.keepalive_interval < absl::Milliseconds(100) || options.keepalive_count < 1) {
    return absl::InvalidArgumentError("keepalive: the interval is at least 100 ms, the count at least 1");
  }
  if (options.connect_timeout <= absl::ZeroDuration()) return absl::InvalidArgumentError("connect_timeout: must be positive");
  return absl::OkStatus();
}

SshAnswerFunction AnswersFromProgram(std::vector<std::string> argv) {
  return [argv = std::move(argv)](const SshChallenge& challenge,
                                  absl::Time deadline) -> absl::StatusOr<std::vector<std::string>> {
    if (argv.empty()) return absl::InvalidArgumentError("no program is named that could answer");
    std::vector<std::string> answers;
    for (const SshPrompt& prompt : challenge.prompts) {
      ITWIN_ASSIGN_OR_RETURN(std::string answer, AskProgram(argv, challenge, prompt, deadline));
      answers.push_back(std::move(answer));
    }
    return answers;
  };
}

}  // namespace itwin::server

#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pwd.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <optional>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/check.h"
#include "common/files.h"
#include "common/subprocess.h"
#include "server/tunnel/ssh_options.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

// A real OpenSSH server for one test: a free port of 127.0.0.1, the current user, keys of its own.
namespace itwin::testing {

inline std::string CurrentUser() {
  const passwd* entry = getpwuid(geteuid());
  ITWIN_CHECK(entry != nullptr);
  return entry->pw_name;
}

// Runs to the end; its output. Failure ends the test program: nothing works without.
inline std::string MustRun(std::vector<std::string> argv) {
  SubprocessOptions options;
  options.argv = std::move(argv);
  const auto output = RunCommand(options, absl::Seconds(60));
  const bool well = output.ok() && output->exit.exit_code == 0 && output->exit.signal == 0;
  if (!well) {
    std::cerr << options.argv[0] << ": " << (output.ok() ? absl::StrCat("exit code ", output->exit.exit_code, "; ", output->err) : output.status().ToString())
              << "\n";
  }
  ITWIN_CHECK(well);
  return output->out;
}

inline void MakeSshKey(const std::string& path, const std::string& type = "ed25519", const std::string& passphrase = "") {
  std::vector<std::string> argv = {"ssh-keygen", "-q", "-t", type, "-N", passphrase, "-C", "itwin-test", "-f", path};
  if (type == "rsa") argv.insert(argv.end(), {"-b", "2048"});
  MustRun(argv);
}

// "SHA256:..." of a public key file.
inline std::string FingerprintOfFile(const std::string& path) {
  const std::vector<std::string> words = absl::StrSplit(MustRun({"ssh-keygen", "-lf", path}), ' ');
  return words.at(1);
}

inline void WriteText(const std::string& path, const std::string& text, unsigned mode = 0600) {
  ITWIN_CHECK(WriteFileAtomically(path, text, mode).ok());
}
inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline int FreePort() {
  const FileDescriptor fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ITWIN_CHECK(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
  ITWIN_CHECK(getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
  return ntohs(address.sin_port);
}

inline bool CanConnect(int port) {
  const FileDescriptor fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
}

// From 9.8 on OpenSSH refuses addresses whose connections have failed before.
inline bool SshdHasPenalties() {
  static const bool has = [] {
    SubprocessOptions options;
    options.argv = {"ssh", "-V"};
    const auto output = RunCommand(options, absl::Seconds(60));
    int major = 0, minor = 0;
    ITWIN_CHECK(output.ok() && std::sscanf(output->err.c_str(), "OpenSSH_%d.%d", &major, &minor) == 2);
    return major > 9 || (major == 9 && minor >= 8);
  }();
  return has;
}

class Sshd {
 public:
  // `lines` come first in its configuration, and the first value of an option counts. One client key is allowed in.
  explicit Sshd(std::vector<std::string> lines = {}, std::vector<std::string> host_key_types = {"ed25519"})
      : lines_(std::move(lines)), host_key_types_(std::move(host_key_types)) {
    for (const std::string& type : host_key_types_) MakeSshKey(host_key(type), type);
    MakeSshKey(client_key());
    WriteText(authorized_keys(), ReadText(client_key() + ".pub"));
    for (int i = 0; i < 5; ++i) {
      port_ = FreePort();
      if (Start()) break;
    }
    ITWIN_CHECK(process_.has_value());
    std::string known;
    for (const std::string& type : host_key_types_) {
      absl::StrAppend(&known, "[127.0.0.1]:", port_, " ", ReadText(host_key(type) + ".pub"));
    }
    WriteText(known_hosts(), known);
  }
  ~Sshd() { Stop(); }

  int port() const { return port_; }
  std::string host_key(const std::string& type = "ed25519") const { return directory_ / ("host_" + type); }
  std::string client_key() const { return directory_ / "client"; }
  std::string authorized_keys() const { return directory_ / "authorized_keys"; }
  std::string known_hosts() const { return directory_ / "known_hosts"; }
  std::string file(const std::string& name) const { return directory_ / name; }
  std::string log() const { return ReadText(directory_ / "log"); }
  server::SshHost host() const { return {.host = "127.0.0.1", .port = port_}; }

  // How the allowed client reaches it.
  server::SshTunnelOptions Options(const std::string& command = "exec cat") const {
    server::SshTunnelOptions options;
    options.hosts = {host()};
    options.user = CurrentUser();
    options.command = command;
    options.identity_file = client_key();
    options.known_hosts_file = known_hosts();
    return options;
  }

  bool Start() {
    // As root it insists on this directory, which its package makes at boot.
    if (geteuid() == 0) mkdir("/run/sshd", 0755);
    std::string config;
    for (const std::string& line : lines_) absl::StrAppend(&config, line, "\n");
    if (SshdHasPenalties()) absl::StrAppend(&config, "PerSourcePenalties no\n");  // tests fail on purpose
    for (const std::string& type : host_key_types_) absl::StrAppend(&config, "HostKey ", host_key(type), "\n");
    absl::StrAppend(&config, "Port ", port_, "\nListenAddress 127.0.0.1\nPidFile none\nAuthorizedKeysFile ", authorized_keys(),
                    "\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n"
                    "KbdInteractiveAuthentication no\nMaxStartups 200\nLogLevel VERBOSE\nUseDNS no\n"
                    "PrintMotd no\nPrintLastLog no\n"
                    // Whatever the account's shell reads at its start is not ours to wait for.
                    "SetEnv HOME=", directory_.path(), "\n");
    WriteText(directory_ / "sshd_config", config);
    const FileDescriptor log(open((directory_ / "log").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    SubprocessOptions options;
    options.argv = {"/usr/sbin/sshd", "-D", "-e", "-f", directory_ / "sshd_config"};
    options.stderr_fd = log.get();
    options.new_session = true;
    auto started = Subprocess::Start(options);
    ITWIN_CHECK(started.ok());
    process_ = *std::move(started);
    const bool up = WaitUntil([&] { return process_->Poll().has_value() || CanConnect(port_); });
    if (up && !process_->Poll()) return true;
    process_.reset();
    return false;
  }
  // The listener and every session of it, at once.
  void Kill() {
    if (!process_) return;
    for (const pid_t pid : Sessions()) kill(pid, SIGKILL);
    process_->Kill(SIGKILL);
    process_->Wait(absl::InfiniteFuture());
    process_.reset();
  }
  void Stop() { Kill(); }
  void KillSessions() {
    for (const pid_t pid : Sessions()) kill(pid, SIGKILL);
  }
  void SignalSessions(int signal) {
    for (const pid_t pid : Sessions()) kill(pid, signal);
  }

  // All processes below the listener that are sshd.
  std::vector<pid_t> Sessions() const {
    std::vector<pid_t> found;
    if (!process_) return found;
    std::vector<pid_t> parents = {process_->pid()};
    for (size_t i = 0; i < parents.size(); ++i) {
      const std::string pid = absl::StrCat(parents[i]);
      const std::string text = ReadText(absl::StrCat("/proc/", pid, "/task/", pid, "/children"));
      for (const absl::string_view word : absl::StrSplit(text, ' ', absl::SkipEmpty())) {
        const pid_t child = static_cast<pid_t>(std::stol(std::string(word)));
        // From OpenSSH 9.8 on a session is a program of its own, sshd-session.
        if (!absl::StartsWith(ReadText(absl::StrCat("/proc/", child, "/comm")), "sshd")) continue;
        parents.push_back(child);
        found.push_back(child);
      }
    }
    return found;
  }

 private:
  const TempDirectory directory_;
  const std::vector<std::string> lines_;
  const std::vector<std::string> host_key_types_;
  int port_ = 0;
  std::optional<Subprocess> process_;
};

}  // namespace itwin::testing

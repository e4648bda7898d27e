#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/tunnel/interrupt.h"
#include "server/tunnel/known_hosts.h"
#include "server/tunnel/ssh_options.h"
#include "server/tunnel/ssh_tunnel.h"

// The only door to libssh. Nothing of it shows here.
namespace itwin::server {

// An SSH session to one host (through others, if the options say so) with one exec channel. Everything that waits also
// ends at the interrupt (kCancelled). All calls from one thread at a time; blocking is all they do.
class SshSession {
 public:
  // Connects, checks the host keys on the way and at the end, logs in.
  static absl::StatusOr<std::unique_ptr<SshSession>> Connect(const SshTunnelOptions& options, const SshHost& host,
                                                             absl::Time deadline, Interrupt* interrupt);
  // The key of the host at the end of options.jump, where nobody logs in.
  static absl::StatusOr<HostKey> FetchKey(const SshTunnelOptions& options, const SshHost& host, absl::Time deadline,
                                          Interrupt* interrupt);
  ~SshSession();

  absl::Status Exec(const std::string& command, absl::Time deadline);

  struct PumpEvents {
    std::function<void(absl::string_view)> on_stderr;
    std::function<void(const SshExit&)> on_exit;  // the command has ended; its last output may still be on the way
  };
  // Moves bytes between the command and the socket (non-blocking, stays the caller's), in bounded memory, until the
  // command has ended and all its output was taken (OK), or the link is lost (kUnavailable says how), or the
  // interrupt: then the channel is closed, and given a second to tell the far side.
  absl::Status Pump(int socket, const PumpEvents& events);

 private:
  struct Parts;
  explicit SshSession(std::unique_ptr<Parts> parts);
  const std::unique_ptr<Parts> parts_;
};

// libssh's own words for the log: printable, one line, and without anything that could be a key or a code.
std::string RedactSshLog(absl::string_view text);

}  // namespace itwin::server

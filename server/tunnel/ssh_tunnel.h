#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/tunnel/known_hosts.h"
#include "server/tunnel/ssh_options.h"
#include "server/tunnel/tunnel.h"

namespace itwin::server {

// How a command at the far end came to its end.
struct SshExit {
  bool known = false;  // false: the connection broke first
  int exit_code = 0;
  std::string signal = {};  // "KILL", "TERM" ...; "" when it exited
};

// A stream whose far end is a command. Standard error is kept apart, see Diagnostics.
class SshStream : public TunnelStream {
 public:
  // Once alive() is false.
  virtual SshExit exit() const = 0;
  // Waits until alive() is false; false at the deadline.
  virtual bool WaitForEnd(absl::Time deadline) = 0;
};

// One SSH session with one exec channel per stream, through libssh. No forwarding, no port, no file at the far end:
// works with `AllowTcpForwarding no` and with a forced command. One thread per open stream owns its session.
//
// Open says kFailedPrecondition when the host key is not known, has changed or is revoked; kUnauthenticated when the
// credentials are missing, expired or refused; kUnavailable for everything that may pass by itself. A host that failed is
// left alone for a while (login_rotation.h); meanwhile Open repeats what was wrong at once, so that whoever retries
// need not know.
class SshTunnel : public Tunnel {
 public:
  // kInvalidArgument: the options make no sense.
  static absl::StatusOr<std::unique_ptr<SshTunnel>> Create(SshTunnelOptions options);
  ~SshTunnel() override;

  absl::StatusOr<std::unique_ptr<TunnelStream>> Open(absl::Time deadline) override;
  // The same with another command than that of the options.
  absl::StatusOr<std::unique_ptr<SshStream>> OpenCommand(const std::string& command, absl::Time deadline);
  std::string description() const override;
  void Cancel() override;

  // When the certificate ends, read anew from its file; InfiniteFuture when there is none or it has no end.
  absl::Time CredentialsExpire() const override;

 private:
  struct State;
  explicit SshTunnel(std::shared_ptr<State> state);
  const std::shared_ptr<State> state_;  // also of the streams
};

// The key that `host` shows, without logging in there: one of options.hosts, or of options.jump. Hosts on the way to it
// are checked and logged in to as ever. Of several keys one that the options know is preferred.
absl::StatusOr<HostKey> FetchHostKey(const SshTunnelOptions& options, const SshHost& host, absl::Time deadline);

}  // namespace itwin::server

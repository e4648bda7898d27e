#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/tunnel/ssh_options.h"

// Single commands and files over SSH, for installing and looking after a site. Each call is a session of its own.
namespace itwin::server {

struct SshCommandResult {
  int exit_code = 0;        // when signal is ""
  std::string signal = {};  // "KILL", "TERM" ...
  std::string out = {};
  std::string err = {};     // its end, at most kMaxDiagnosticsBytes
  bool truncated = false;   // `out` was longer than kMaxSshCommandOutput: this is its beginning
};
inline constexpr size_t kMaxSshCommandOutput = 1 << 20;

// Gives the next bytes for the command's standard input, "" at the end.
using SshInput = std::function<absl::StatusOr<std::string>()>;

// Runs the command line (for the account's shell) to its end. That it failed is no error of this call; kUnavailable when
// the connection broke, kDeadlineExceeded at the deadline, else as SshTunnel::Open. An error of `input` ends the
// command and is returned. `input` may be null: no input.
absl::StatusOr<SshCommandResult> RunSshCommand(const SshTunnelOptions& options, const std::string& command,
                                               const SshInput& input, absl::Time deadline);

// Sends a file: whole or not at all, checked by its SHA-256 at the far end, renamed into place, mode set before. What an
// interrupted call has sent is gone on from by the next one; a file that is there already is not sent again.
// `remote_path` without a leading "/" is below the account's home; parent directories are made. `progress` gets bytes
// there and in all. kResourceExhausted: no space or quota there; kDataLoss: what arrived is not what was sent.
absl::Status UploadFile(const SshTunnelOptions& options, const std::string& local_path, const std::string& remote_path,
                        unsigned mode, absl::Time deadline,
                        const std::function<void(int64_t sent, int64_t total)>& progress = nullptr);

}  // namespace itwin::server

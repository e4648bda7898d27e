#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/tunnel/tunnel.h"

namespace itwin::server {

struct ProcessTunnelOptions {
  // Any command line whose standard input and output lead to `itwin-agent connect`: the agent itself, or
  // for example {"ssh", "-T", "login.example", "itwin-agent", "connect"}.
  std::vector<std::string> argv;
  std::vector<std::pair<std::string, std::string>> env;  // added to ours
  // After the stream is closed the program sees end of file; then it has this long before SIGTERM, and
  // again this long before SIGKILL.
  absl::Duration grace = absl::Seconds(1);
};

// The stream is a child process of the gateway. One thread per open stream reads its standard error.
class ProcessTunnel : public Tunnel {
 public:
  explicit ProcessTunnel(ProcessTunnelOptions options);
  absl::StatusOr<std::unique_ptr<TunnelStream>> Open(absl::Time deadline) override;
  std::string description() const override;
  void Cancel() override { cancelled_ = true; }  // starting a program does not wait

 private:
  const ProcessTunnelOptions options_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace itwin::server

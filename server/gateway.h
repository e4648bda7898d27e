#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/config.h"

namespace itwin::server {

// A running gateway: everything is made in Create, in the order in which it is needed, and unmade by Stop in reverse.
// Jobs and agents do not notice either.
class Gateway {
 public:
  struct Options {
    std::string data;           // made by Init
    GatewayConfig config;       // checked
    std::string agent_program;  // for the embedded site; "": beside this program, or in ../libexec/itwin
  };
  // Serves when it returns. kFailedPrecondition: not initialised, or another gateway has the directory;
  // kUnavailable: the address is taken. The message says what to do.
  static absl::StatusOr<std::unique_ptr<Gateway>> Create(const Options& options);
  ~Gateway();  // stops

  int port() const;
  const std::string& endpoint() const;  // for clients on this machine

  // Takes no new calls, ends watch streams with UNAVAILABLE, lets the others finish for a few seconds, then leaves the
  // sites and closes the store. Idempotent.
  void Stop();

 private:
  struct Parts;
  explicit Gateway(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

// The agent that is installed with this gateway. kNotFound saying where it was looked for.
absl::StatusOr<std::string> FindAgentProgram();

}  // namespace itwin::server

#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

// How a gateway is found and reached.
namespace itwin::client {

class Client;
class Connection;

struct ConnectOptions {
  std::string endpoint{};     // "host:port" or "unix:/path"
  std::string ca_file{};      // PEM of the CA that signed the gateway's certificate; empty: the system's CAs
  std::string token_file{};   // file with the bearer token, one line
  std::string token{};        // instead of the file
  std::string server_name{};  // name in the certificate when it is not the endpoint's host (behind a port forward)
  bool insecure = false;    // plain text; only for loopback and Unix sockets

  absl::Duration call_deadline = absl::Seconds(30);  // of one try of a unary call
  // How long calls are repeated while the gateway cannot be reached. Only calls that can safely be repeated are
  // (all of them are: submissions carry a request id).
  absl::Duration retry_for = absl::Seconds(15);
  // Told before every repeated try, with the error and the delay; in the caller's thread.
  std::function<void(const absl::Status&, absl::Duration)> on_retry{};
};

using Environment = std::function<std::optional<std::string>(const std::string& name)>;
Environment ProcessEnvironment();

// Fills what is empty, field by field: first from the environment (ITWIN_ENDPOINT, ITWIN_CA_FILE, ITWIN_TOKEN_FILE or
// ITWIN_TOKEN, ITWIN_SERVER_NAME, ITWIN_INSECURE=1), then from the YAML file $ITWIN_CONFIG or ~/.config/itwin/config.yaml
// with the keys endpoint, ca_file, token_file, server_name, insecure (relative paths are relative to that file). Reads
// the token file into `token`. kInvalidArgument, kNotFound or kPermissionDenied say which setting is wrong and what to
// do; the token is never in a message.
absl::StatusOr<ConnectOptions> ResolveOptions(ConnectOptions given, const Environment& environment);

// Resolves, checks and prepares; the network is first used by the first call. kInvalidArgument for plain text to
// another machine.
absl::StatusOr<Client> Connect(ConnectOptions options = {});
absl::StatusOr<std::shared_ptr<Connection>> MakeConnection(const ConnectOptions& resolved);

}  // namespace itwin::client

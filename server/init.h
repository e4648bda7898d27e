#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/store/token_store.h"

// The data directory of a gateway, and making one. All below it is for its owner alone (0700, 0600):
//   gateway.db  blobs/  partial/  gateway.yaml (optional)
//   tls/{ca.key,ca.pem,server.key,server.pem}
//   client/{config.yaml,ca.pem,token}   what the first user needs
//   sites/local/                        root of the embedded site
//   sites/<name>.yaml, <name>.paused    sites that an administrator added; that one is paused
//   run/{lock,pid,endpoint}
namespace itwin::server {

struct DataDirectory {
  std::string root;
  std::string database() const { return root + "/gateway.db"; }
  std::string config() const { return root + "/gateway.yaml"; }
  std::string tls(const std::string& name) const { return root + "/tls/" + name; }
  std::string client(const std::string& name) const { return root + "/client/" + name; }
  std::string sites() const { return root + "/sites"; }
  std::string site(const std::string& name) const { return root + "/sites/" + name; }
  std::string run(const std::string& name) const { return root + "/run/" + name; }
};

struct InitOptions {
  std::string data = {};           // made when missing
  std::string listen = "127.0.0.1:7443";
  std::vector<std::string> hosts = {};  // further names and addresses of the gateway, for its certificate
  std::string user = {};           // name of the first token
  bool install_client = false;     // also copy client/ to ~/.config/itwin
};
struct InitReport {
  std::vector<std::string> done;   // what was made, one clause each; empty when all was there
  std::string client_config;       // path
  std::string installed_config;    // path, when copied
  std::vector<std::string> hosts;  // of the certificate
};
// Makes what is missing and leaves what is there; a certificate that lacks one of `hosts` is issued again by the same
// authority. Also beside a running gateway.
absl::StatusOr<InitReport> Init(const InitOptions& options);

// Makes a token, stores its hash and returns its text, which is nowhere else.
absl::StatusOr<std::string> AddToken(TokenStore* tokens, const std::string& name, TokenRole role);

// Where clients of this machine connect when the gateway listens at `listen`.
std::string ClientEndpoint(const std::string& host, int port);
// Rewrites client/config.yaml when it names another endpoint.
absl::Status UpdateClientEndpoint(const DataDirectory& data, const std::string& endpoint);

}  // namespace itwin::server

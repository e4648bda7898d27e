#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/sites/site_file.h"

// What a gateway is told: built-in defaults, then the file `<data>/gateway.yaml`, then the environment, then flags.
//
//   listen: 127.0.0.1:7443           # port 0: any free one; the real one is in <data>/run/endpoint
//   log_level: info                  # debug, info, warning, error
//   limits:
//     live_jobs_per_owner: 20000
//     rpc_threads: 160
//     log_mirror_mib: 16             # kept of stdout and stderr each, per attempt
//   job_retention: 0                 # how long finished jobs are kept, with their points and logs; 0: for ever
//   local:                           # the embedded site
//     enabled: true
//     slots: 4                       # ranks at once; default: the cores of this machine
//     launcher: mpirun -n {ranks}    # default: the agent's
//   sites:                           # further ones, each with the keys of a site file (docs/sites.md)
//     - name: vega
//       command: [ssh, -T, login.vega.example, itwin-agent, connect, --root, /scratch/itwin]
//       max_waiting: 200
namespace itwin::server {

struct LocalSiteConfig {
  bool enabled = true;
  int slots = 0;         // 0: the cores of this machine
  std::string launcher;  // "": the agent's default
  int max_waiting = 64;
  absl::Duration spool_retention = absl::Hours(24 * 7);
};

struct GatewayConfig {
  std::string listen = "127.0.0.1:7443";
  std::string log_level = "info";
  int live_jobs_per_owner = 20'000;
  int rpc_threads = 160;
  int log_mirror_mib = 16;
  absl::Duration job_retention = absl::ZeroDuration();  // after the end of a job; zero: for ever
  LocalSiteConfig local;
  std::vector<SiteFile> sites;  // beside those that `itwin site add` has put into <data>/sites/
};

// What flags and environment say; unset: nothing.
struct ConfigOverrides {
  std::optional<std::string> listen;
  std::optional<std::string> log_level;
  std::optional<int> slots;
  std::optional<bool> local;
};

// kInvalidArgument with all problems, one per line, each as "gateway.yaml:3: listne: unknown key; did you mean 'listen'?".
absl::StatusOr<GatewayConfig> ParseConfig(absl::string_view text, absl::string_view file_name);
// The defaults when there is no such file.
absl::StatusOr<GatewayConfig> ReadConfig(const std::string& path);
void Apply(const ConfigOverrides& overrides, GatewayConfig* config);
// Ranges and names. kInvalidArgument as above.
absl::Status CheckConfig(const GatewayConfig& config);

// "127.0.0.1:7443", "[::1]:7443", "gateway.example:7443" taken apart. kInvalidArgument.
struct HostAndPort {
  std::string host;
  int port = 0;
};
absl::StatusOr<HostAndPort> ParseListen(absl::string_view text);

}  // namespace itwin::server

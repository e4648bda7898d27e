#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/spec/strict_yaml.h"
#include "server/dispatch/site_settings.h"

// A site as its administrator writes it down: YAML with strict keys, one file per site (docs/sites.md has every key).
// Secrets are paths of files, never values. Pure, but for ReadSiteFile and CheckSecretFiles.
namespace itwin::server {

struct SshSettings {
  std::vector<std::string> hosts;   // login nodes, tried in this order
  std::string user;                 // "": the gateway's own account name
  int port = 22;
  std::string key;                  // path of the private key
  std::string certificate;          // path; read anew for every connection, since it may be short-lived
  std::string passphrase_file;
  bool agent = false;               // also ask $SSH_AUTH_SOCK
  std::string known_hosts;          // path
  std::vector<std::string> fingerprints;  // "SHA256:…" of host keys, also of the jump host; beside or instead of known_hosts
  std::string jump;                 // "user@host:port"
  std::string one_time_code_program;  // path of a program that prints a code
  absl::Duration keepalive = absl::Seconds(10);
};

struct SiteFile {
  std::string name;
  std::optional<SshSettings> ssh;      // one of these two
  std::vector<std::string> command;    // leads to `itwin-agent connect`
  std::string root;                    // of the spool, at the site; may begin with ~/ and hold $NAME
  std::string agent;                   // path of itwin-agent at the site; "": the one that is installed below root
  std::string worker_path;             // of itwin-worker at the site; "": the one that is installed
  std::string worker_bundle;           // made by deploy/make-worker-bundle.sh; a path of the gateway's machine
  std::string worker_operators;        // what `itwin-worker --operators` printed at the site; a path of the gateway's machine
  absl::Duration query_interval = absl::ZeroDuration();  // least time between two looks at the queue; zero: the agent's own
  int max_waiting = 64;                // attempts handed over that have not started yet
  absl::Duration spool_retention = absl::Hours(24 * 7);  // after the end of a job; zero: for ever
  SiteSettings settings;

  bool installs() const { return ssh.has_value() && agent.empty(); }
  // "ssh ada@login.example", or the command line.
  std::string address() const;
};

// Reads the keys of one site into `out`, as part of a larger document too.
StrictYaml::Take SiteKeys(StrictYaml* reader, SiteFile* out);
// A whole file. kInvalidArgument with all problems, one per line, each as "vega.yaml:3: shh: unknown key; did you mean 'ssh'?".
absl::StatusOr<SiteFile> ParseSiteFile(absl::string_view text, absl::string_view file_name);
absl::StatusOr<SiteFile> ReadSiteFile(const std::string& path);
// Names, ranges, and that everything that is needed is there; `path` stands before each key in a message.
std::vector<std::string> SiteProblems(const SiteFile& site, const std::string& path);

// Private keys and passphrases exist, and only their owner can read them. kPermissionDenied or kNotFound, with the next step.
absl::Status CheckSecretFiles(const SiteFile& site);

// The same document with these fingerprints under `ssh`: what stays of "itwin site add --accept-host-key".
// kFailedPrecondition: there are some already.
absl::StatusOr<std::string> WithFingerprints(absl::string_view document, const std::vector<std::string>& fingerprints);

// For the site's shell: `~/` and `$NAME` are left to it, everything else is literal.
std::string ShellPath(absl::string_view path);
// What is run at the site to reach its agent.
std::string ConnectCommand(const SiteFile& site);

bool IsSiteName(absl::string_view name);

}  // namespace itwin::server

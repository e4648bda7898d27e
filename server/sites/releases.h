#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/dispatch/agent_client.h"
#include "server/dispatch/worker_operators.h"
#include "server/sites/site_file.h"
#include "server/tunnel/ssh_options.h"

// The programs that a site gets from the gateway: `<root>/releases/<version>-<hash>/{itwin-agent,itwin-worker}`, and the link
// `<root>/releases/current`. A release is made whole and never changed; attempts run from the one they were started from.
namespace itwin::server {

// What the gateway has to give. Thread-safe; hashes are read once.
class GatewayPrograms {
 public:
  // `worker`: "" when there is none.
  GatewayPrograms(std::string agent, std::string worker) : agent_(std::move(agent)), worker_(std::move(worker)) {}

  struct Program {
    std::string path = {};
    std::string sha256 = {};
    int64_t size = 0;
  };
  bool has_agent() const { return !agent_.empty(); }
  // kFailedPrecondition: there is none.
  absl::StatusOr<Program> Agent();
  // Of a site: the bundle of its file, else the gateway's own; path "" when the site brings its own, or there is none.
  absl::StatusOr<Program> WorkerFor(const SiteFile& site);
  // What models may use there: by the file that the site names, the one beside its bundle, or the gateway's own worker. Null when
  // only the site's own worker can say. kInvalidArgument: the named file is not that list.
  absl::StatusOr<std::shared_ptr<WorkerOperators>> OperatorsOf(const SiteFile& site);

 private:
  absl::StatusOr<Program> Read(const std::string& path, Program* memory) ABSL_LOCKS_EXCLUDED(mu_);

  const std::string agent_;
  const std::string worker_;
  absl::Mutex mu_;
  Program agent_read_ ABSL_GUARDED_BY(mu_);
  Program worker_read_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<WorkerOperators> own_operators_ ABSL_GUARDED_BY(mu_);
};

// "0.1.0-1a2b3c4d".
std::string ReleaseName(const GatewayPrograms::Program& agent, const GatewayPrograms::Program& worker);

// What a login node is like; asked for with one command.
struct LoginNode {
  bool forced_command = false;  // it runs a command of its own, whatever it is asked; the rest is not known then
  bool agent_answers = false;   // the forced command looks like `itwin-agent connect`
  std::string said;             // the beginning of what came instead, for people
  std::string root;             // absolute
  std::string machine;          // "x86_64"
  std::string current;          // release, "" for none
};
absl::StatusOr<LoginNode> LookAtLoginNode(const SshTunnelOptions& options, const SiteFile& site, absl::Time deadline);

// Done and all, in bytes; false: stop with kCancelled.
using OnSent = std::function<bool(int64_t sent, int64_t total)>;

struct Installed {
  std::string release;
  bool was_there = false;  // nothing was sent
};
// By SSH commands. Sends what the site lacks, checks it there by SHA-256, and switches `current` last. kFailedPrecondition: another
// kind of machine.
absl::StatusOr<Installed> InstallOverSsh(const SshTunnelOptions& options, const SiteFile& site, const LoginNode& node,
                                         GatewayPrograms* programs, absl::Time deadline, const OnSent& on_sent);

// Through the running agent. A worker that was installed as a bundle is taken over from the release before.
absl::StatusOr<Installed> InstallOverAgent(AgentClient* agent, const SiteFile& site, GatewayPrograms* programs, absl::Duration stall);

// Renews a site's agent when it is not the gateway's own version: SiteDispatcher::Dependencies::renew.
class AgentRenewal {
 public:
  // `programs` must outlive it.
  AgentRenewal(SiteFile site, GatewayPrograms* programs) : site_(std::move(site)), programs_(programs) {}
  absl::StatusOr<bool> Renew(AgentClient* agent, const agent::v1::HelloResponse& hello);

 private:
  const SiteFile site_;
  GatewayPrograms* const programs_;
  std::string tried_;  // hash of the agent that was to be renewed: once is enough
};

// -1, 0, 1: dotted numbers; what is no number is equal.
int CompareVersions(absl::string_view a, absl::string_view b);

}  // namespace itwin::server

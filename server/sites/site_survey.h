#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "itwin/v1/sites.pb.h"
#include "server/dispatch/agent_client.h"
#include "server/sites/releases.h"
#include "server/sites/site_file.h"
#include "server/tunnel/known_hosts.h"

namespace itwin::server {

// Walks to a site step by step, for `itwin site add` and `itwin site doctor`: credentials, host keys, login, programs, agent,
// and the agent's own checks. Tells each step; straight-line code for one thread.
class SiteSurvey {
 public:
  using OnProgress = std::function<bool(const v1::SiteProgress&)>;
  struct Options {
    SiteFile site;
    GatewayPrograms* programs = nullptr;  // outlives it
    std::string gateway_id;
    bool install = false;                          // bring what the site lacks
    bool run_jobs = true;                          // the check on compute nodes too
    std::vector<std::string> accepted_fingerprints;  // the user has compared these
    absl::Duration limit = absl::Minutes(15);
  };
  SiteSurvey(Options options, OnProgress on_progress) : options_(std::move(options)), on_progress_(std::move(on_progress)) {}

  // From any thread: Run ends soon, with kCancelled.
  void Cancel();

  // The first step that makes the next ones senseless ends it with its error, which has been told as well.
  absl::Status Run();

  int errors() const { return errors_; }      // checks that failed, also when Run is OK
  // Host keys that nobody knew and the user accepted; to be kept with the site.
  const std::vector<std::string>& newly_trusted() const { return newly_trusted_; }
  // Whether no agent ran there before; then a survey that failed ends the one it started.
  void EndAgent();

 private:
  absl::Status CheckCredentials();
  absl::Status CheckHostKeys();
  absl::Status CheckHostKeyOf(const SshHost& host, bool is_jump, std::vector<std::string>* unknown, std::string* known);
  absl::Status LookAndInstall();
  absl::Status SayHello();
  absl::Status AskAgent();

  // False: nobody listens.
  bool Tell(const std::string& step, v1::SiteCheck verdict, const std::string& found, const std::string& advice = "", double fraction = 0);
  // Tells it as an error and returns it.
  absl::Status Failed(const std::string& step, const absl::Status& status);
  absl::Time Deadline() const { return deadline_; }

  const Options options_;
  const OnProgress on_progress_;
  absl::Time deadline_ = absl::InfiniteFuture();
  SshTunnelOptions ssh_;
  std::unique_ptr<Tunnel> tunnel_;
  std::shared_ptr<AgentClient> agent_;
  agent::v1::HelloResponse hello_;
  bool forced_command_ = false;
  std::atomic<bool> listening_ = true;
  absl::Mutex mu_;
  std::shared_ptr<AgentClient> open_agent_ ABSL_GUARDED_BY(mu_);  // so that Cancel can end its calls
  int errors_ = 0;
  std::vector<std::string> newly_trusted_;
};

}  // namespace itwin::server

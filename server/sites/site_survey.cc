#include "server/sites/site_survey.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/status_macros.h"
#include "common/version.h"
#include "server/sites/site_link.h"
#include "server/tunnel/ssh_tunnel.h"

namespace itwin::server {
namespace {

constexpr int kProtocol = 1;
constexpr absl::Duration kReachLimit = absl::Seconds(30);
constexpr absl::Duration kDiagnoseLimit = absl::Minutes(5);
constexpr absl::Duration kSoon = absl::Hours(24);
constexpr absl::Duration kSkewWarning = absl::Seconds(5);
constexpr absl::Duration kSkewError = absl::Minutes(5);

v1::SiteCheck ToSiteCheck(agent::v1::CheckVerdict verdict) {
  switch (static_cast<int>(verdict)) {
    case agent::v1::CHECK_VERDICT_OK: return v1::SITE_CHECK_OK;
    case agent::v1::CHECK_VERDICT_WARNING: return v1::SITE_CHECK_WARNING;
    case agent::v1::CHECK_VERDICT_ERROR: return v1::SITE_CHECK_ERROR;
    case agent::v1::CHECK_VERDICT_SKIPPED: return v1::SITE_CHECK_SKIPPED;
    default: return v1::SITE_CHECK_UNSPECIFIED;
  }
}

std::string HostText(const SshHost& host) { return host.port == 22 ? host.host : absl::StrCat(host.host, " port ", host.port); }

std::string MegabytesText(int64_t bytes) { return absl::StrCat(static_cast<int64_t>(std::ceil(static_cast<double>(bytes) / 1e6)), " MB"); }

}  // namespace

bool SiteSurvey::Tell(const std::string& step, v1::SiteCheck verdict, const std::string& found, const std::string& advice, double fraction) {
  v1::SiteProgress progress;
  progress.set_step(step);
  progress.set_verdict(verdict);
  progress.set_found(found);
  progress.set_advice(advice);
  progress.set_fraction(fraction);
  if (verdict == v1::SITE_CHECK_ERROR) ++errors_;
  if (listening_ && on_progress_ && !on_progress_(progress)) listening_ = false;
  return listening_;
}

absl::Status SiteSurvey::Failed(const std::string& step, const absl::Status& status) {
  Tell(step, v1::SITE_CHECK_ERROR, std::string(status.message()));
  return status;
}

absl::Status SiteSurvey::Run() {
  deadline_ = absl::Now() + options_.limit;
  using Step = absl::Status (SiteSurvey::*)();
  for (const Step step : {&SiteSurvey::CheckCredentials, &SiteSurvey::CheckHostKeys, &SiteSurvey::LookAndInstall, &SiteSurvey::SayHello,
                          &SiteSurvey::AskAgent}) {
    ITWIN_RETURN_IF_ERROR((this->*step)());
    if (!listening_) return absl::CancelledError("nobody waits for it any more");
  }
  return absl::OkStatus();
}

void SiteSurvey::Cancel() {
  listening_ = false;
  absl::MutexLock lock(&mu_);
  if (open_agent_) open_agent_->Close();
}

void SiteSurvey::EndAgent() {
  if (agent_) agent_->Retire(absl::Now() + kReachLimit).IgnoreError();  // it may be too old to know how; it is idle then
}

absl::Status SiteSurvey::CheckCredentials() {
  if (!options_.site.ssh) return absl::OkStatus();
  if (const absl::Status files = CheckSecretFiles(options_.site); !files.ok()) return Failed("credentials", files);
  absl::StatusOr<SshTunnelOptions> made = SshOptionsOf(options_.site);
  if (!made.ok()) return Failed("credentials", made.status());
  ssh_ = *std::move(made);
  absl::StatusOr<std::unique_ptr<SshTunnel>> tunnel = SshTunnel::Create(ssh_);
  if (!tunnel.ok()) return Failed("credentials", tunnel.status());
  const absl::Time end = (*tunnel)->CredentialsExpire();
  const std::string key = ssh_.identity_file.empty() ? "keys of the SSH agent" : ssh_.identity_file;
  const absl::Duration left = end - absl::Now();
  if (end == absl::InfiniteFuture()) {
    Tell("credentials", v1::SITE_CHECK_OK, key);
  } else if (left <= absl::ZeroDuration()) {
    return Failed("credentials", absl::UnauthenticatedError(absl::StrCat(
                                     "the certificate of ", key, " ended on ", absl::FormatTime("%Y-%m-%d %H:%M", end, absl::LocalTimeZone()),
                                     "; fetch a new one from the site and put it in the same place")));
  } else {
    Tell("credentials", left < kSoon ? v1::SITE_CHECK_WARNING : v1::SITE_CHECK_OK,
         absl::StrCat(key, ", certificate good until ", absl::FormatTime("%Y-%m-%d %H:%M", end, absl::LocalTimeZone())),
         left < kSoon ? "have it renewed by a timer; without one, jobs wait as PAUSED_AUTH until a new certificate lies there" : "");
  }
  return absl::OkStatus();
}

absl::Status SiteSurvey::CheckHostKeyOf(const SshHost& host, bool is_jump, std::vector<std::string>* unknown, std::string* known) {
  ITWIN_ASSIGN_OR_RETURN(const HostKey key, FetchHostKey(ssh_, host, std::min(deadline_, absl::Now() + kReachLimit)));
  const std::string shown = absl::StrCat(HostText(host), " ", key.type, " ", key.fingerprint);
  const auto has = [&](const std::vector<std::string>& list) { return std::find(list.begin(), list.end(), key.fingerprint) != list.end(); };
  if (has(ssh_.fingerprints)) {
    *known = shown;
    return absl::OkStatus();
  }
  HostKeyCheck check;
  if (!ssh_.known_hosts_file.empty()) {
    const absl::StatusOr<std::string> text = ReadFile(ssh_.known_hosts_file);
    if (!text.ok() && text.status().code() != absl::StatusCode::kNotFound) return text.status();
    if (text.ok()) check = CheckHostKey(*text, key);
  } else if (!options_.site.ssh->fingerprints.empty() && !has(options_.accepted_fingerprints)) {
    check.verdict = HostKeyVerdict::kChanged;
    check.expected = options_.site.ssh->fingerprints;
  }
  switch (check.verdict) {
    case HostKeyVerdict::kKnown: *known = shown; return absl::OkStatus();
    case HostKeyVerdict::kRevoked:
      return absl::FailedPreconditionError(absl::StrCat("the host key of ", shown, " is marked as revoked in ", ssh_.known_hosts_file, "; do not go on"));
    case HostKeyVerdict::kChanged:
      return absl::FailedPreconditionError(absl::StrCat(
          "the host key of ", HostText(host), " is not the one that is expected: it shows ", key.type, " ", key.fingerprint, ", and the site file knows ",
          absl::StrJoin(check.expected, ", "),
          ". Somebody may be in between. If the site has announced a new key, put its fingerprint under ssh.fingerprint",
          ssh_.known_hosts_file.empty() ? "" : absl::StrCat(" (or into ", ssh_.known_hosts_file, ")"), " and repeat with --replace"));
    case HostKeyVerdict::kUnknown: break;
  }
  if (has(options_.accepted_fingerprints)) {
    newly_trusted_.push_back(key.fingerprint);
    ssh_.fingerprints.push_back(key.fingerprint);
    *known = absl::StrCat(shown, ", accepted now");
    return absl::OkStatus();
  }
  unknown->push_back(absl::StrCat(key.fingerprint, " ", key.type, " of ", HostText(host)));
  // Nothing beyond an unknown jump host can be asked.
  return is_jump ? absl::FailedPreconditionError("") : absl::OkStatus();
}

absl::Status SiteSurvey::CheckHostKeys() {
  if (!options_.site.ssh) return absl::OkStatus();
  Tell("host key", v1::SITE_CHECK_UNSPECIFIED, absl::StrCat("asking ", absl::StrJoin(options_.site.ssh->hosts, ", ")));
  std::vector<std::string> unknown, known;
  absl::Status last;
  const auto check = [&](const SshHost& host, bool is_jump) {
    std::string one;
    const absl::Status status = CheckHostKeyOf(host, is_jump, &unknown, &one);
    if (!one.empty()) known.push_back(one);
    return status;
  };
  const std::vector<SshHost> jumps = ssh_.jump, hosts = ssh_.hosts;
  for (const SshHost& host : jumps) {
    const absl::Status status = check(host, true);
    if (!status.ok() && unknown.empty()) return Failed("host key", status);
    if (!status.ok()) break;
  }
  if (unknown.empty()) {
    for (const SshHost& host : hosts) {
      const absl::Status status = check(host, false);
      if (status.ok()) continue;
      // One login node of several may be away; a wrong key ends it.
      if (status.code() != absl::StatusCode::kUnavailable && status.code() != absl::StatusCode::kDeadlineExceeded) return Failed("host key", status);
      last = status;
      if (hosts.size() > 1) Tell("host key", v1::SITE_CHECK_WARNING, std::string(status.message()), "the other login nodes are used meanwhile");
    }
  }
  if (!unknown.empty()) {
    std::vector<std::string> fingerprints;
    for (const std::string& one : unknown) fingerprints.push_back(one.substr(0, one.find(' ')));
    return Failed("host key",
                  absl::FailedPreconditionError(absl::StrCat(
                      "nobody has vouched for the host key yet: ", absl::StrJoin(unknown, "; "),
                      ". Compare it with what the site publishes (or `ssh-keygen -lf` there). If it is the same: itwin site add FILE --accept-host-key ",
                      absl::StrJoin(fingerprints, ","))));
  }
  if (known.empty()) return Failed("host key", last);
  Tell("host key", v1::SITE_CHECK_OK, absl::StrJoin(known, "; "));
  return absl::OkStatus();
}

absl::Status SiteSurvey::LookAndInstall() {
  if (!options_.site.ssh) return absl::OkStatus();
  const absl::StatusOr<LoginNode> node = LookAtLoginNode(ssh_, options_.site, std::min(deadline_, absl::Now() + 2 * kReachLimit));
  if (!node.ok()) return Failed("login", node.status());
  if (node->forced_command) {
    forced_command_ = true;
    if (!node->agent_answers) {
      return Failed("login", absl::FailedPreconditionError(absl::StrCat(
                                 "the account's key runs a command of its own, and that is no itwin-agent: it says '", node->said,
                                 "'. Its line in authorized_keys should read: restrict,command=\"/path/to/itwin-agent connect --root ", options_.site.root,
                                 options_.site.settings.scheduler.empty() ? "" : " --scheduler " + options_.site.settings.scheduler, "\" ssh-ed25519 ...")));
    }
    Tell("login", v1::SITE_CHECK_OK, absl::StrCat(ssh_.user, ": the key may run itwin-agent and nothing else"));
    if (options_.install) {
      Tell("install", v1::SITE_CHECK_SKIPPED, "nothing can be installed by a key that may only run the agent",
           absl::StrCat("the site's administrator installs and renews itwin-agent ", kVersion, " (the one file ",
                        "build/bin/itwin-agent, or libexec/itwin) and itwin-worker; when the program lies below ",
                        options_.site.root, "/releases/current, the gateway renews it by itself"));
    }
    return absl::OkStatus();
  }
  Tell("login", v1::SITE_CHECK_OK, absl::StrCat(ssh_.user, ", ", node->machine, ", root ", node->root));
  if (!options_.install) return absl::OkStatus();
  if (!options_.site.installs()) {
    Tell("install", v1::SITE_CHECK_SKIPPED, absl::StrCat("the site file names the agent: ", options_.site.agent));
    return absl::OkStatus();
  }
  Tell("install", v1::SITE_CHECK_UNSPECIFIED, absl::StrCat("into ", node->root, "/releases"));
  int64_t bytes = 0;
  double told = 0;
  const absl::StatusOr<Installed> installed =
      InstallOverSsh(ssh_, options_.site, *node, options_.programs, deadline_, [&](int64_t sent, int64_t total) -> bool {
        bytes = total;
        const double fraction = total > 0 ? static_cast<double>(sent) / static_cast<double>(total) : 1;
        if (fraction < told + 0.01) return listening_;
        told = fraction;
        return Tell("install", v1::SITE_CHECK_UNSPECIFIED, absl::StrCat("sending ", MegabytesText(total)), "", fraction);
      });
  if (!installed.ok()) return Failed("install", installed.status());
  Tell("install", v1::SITE_CHECK_OK,
       installed->was_there ? absl::StrCat(installed->release, " is there already")
                            : absl::StrCat(installed->release, " in ", node->root, "/releases (", MegabytesText(bytes), " sent)"));
  return absl::OkStatus();
}

absl::Status SiteSurvey::SayHello() {
  Tell("agent", v1::SITE_CHECK_UNSPECIFIED, absl::StrCat("starting it by ", options_.site.ssh ? "SSH" : "the command line"));
  if (options_.site.ssh) {
    absl::StatusOr<std::unique_ptr<SshTunnel>> tunnel = SshTunnel::Create(ssh_);  // with the keys accepted now
    if (!tunnel.ok()) return Failed("agent", tunnel.status());
    tunnel_ = *std::move(tunnel);
  } else {
    absl::StatusOr<std::unique_ptr<Tunnel>> tunnel = MakeTunnel(options_.site);
    if (!tunnel.ok()) return Failed("agent", tunnel.status());
    tunnel_ = *std::move(tunnel);
  }
  AgentRenewal renewal(options_.site, options_.programs);
  bool renewed = false;
  for (const bool may_renew : {true, false}) {
    const absl::Time deadline = std::min(deadline_, absl::Now() + 2 * kReachLimit);
    absl::StatusOr<std::unique_ptr<TunnelStream>> stream = tunnel_->Open(deadline);
    if (!stream.ok()) return Failed("agent", stream.status());
    agent_ = MakeGrpcAgentClient(*std::move(stream));
    {
      absl::MutexLock lock(&mu_);
      open_agent_ = agent_;
    }
    if (!listening_) return absl::CancelledError("nobody waits for it any more");
    agent::v1::HelloRequest request;
    request.set_protocol(kProtocol);
    request.set_gateway_version(kVersion);
    request.set_gateway_id(options_.gateway_id);
    request.set_scheduler(options_.site.settings.scheduler);
    absl::StatusOr<agent::v1::HelloResponse> hello = agent_->Hello(request, deadline);
    if (!hello.ok()) {
      // One that runs something else than the file says is not left behind.
      if (options_.install && hello.status().code() == absl::StatusCode::kFailedPrecondition) EndAgent();
      agent_->Close();  // its last words are complete then
      const std::string words = agent_->Diagnostics();
      agent_.reset();
      return Failed("agent", words.empty() ? hello.status()
                                           : absl::Status(hello.status().code(), absl::StrCat(hello.status().message(), "; the far side says: ", words)));
    }
    hello_ = *std::move(hello);
    if (!options_.install || !may_renew) break;
    // One of another version may still run there from before.
    const absl::StatusOr<bool> again = renewal.Renew(agent_.get(), hello_);
    if (!again.ok()) Tell("agent", v1::SITE_CHECK_WARNING, absl::StrCat("not renewed: ", again.status().message()), "its own version is used");
    if (!again.ok() || !*again) break;
    renewed = true;
    agent_->Close();
  }
  Tell("agent", v1::SITE_CHECK_OK,
       absl::StrCat("itwin-agent ", hello_.agent_version(), " of ", hello_.user(), " on ", hello_.host(), ", scheduler ", hello_.scheduler(),
                    ", spool ", hello_.spool(), renewed ? ", renewed now" : ""));
  const absl::Duration skew = absl::FromUnixMicros(hello_.time_us()) - absl::Now();
  const std::string seconds = absl::StrCat(std::llround(std::abs(absl::ToDoubleSeconds(skew))), " s ", skew > absl::ZeroDuration() ? "ahead of" : "behind");
  if (skew > kSkewError || skew < -kSkewError) {
    Tell("clock", v1::SITE_CHECK_WARNING, absl::StrCat("the site's clock is ", seconds, " the gateway's"),
         "set one of them right (NTP): times of events and points will not fit together");
  } else if (skew > kSkewWarning || skew < -kSkewWarning) {
    Tell("clock", v1::SITE_CHECK_WARNING, absl::StrCat("the site's clock is ", seconds, " the gateway's"), "have both follow NTP");
  } else {
    Tell("clock", v1::SITE_CHECK_OK, "within 5 s of the gateway's");
  }
  return absl::OkStatus();
}

absl::Status SiteSurvey::AskAgent() {
  agent::v1::DiagnoseRequest request;
  request.set_run_jobs(options_.run_jobs);
  *request.mutable_launch() = options_.site.settings.launch;
  const absl::StatusOr<std::string> container = ContainerLine(options_.site.name, options_.site.settings, "");
  if (container.ok()) {
    request.mutable_launch()->set_container(*container);
  } else {
    // Jobs that name an image run; there is none to try the worker in.
    Tell("container", v1::SITE_CHECK_WARNING, std::string(container.status().message()),
         "give `image` in the site file, so that jobs which name none run, and the worker can be tried");
    request.mutable_launch()->clear_container();
    request.set_run_jobs(false);
  }
  if (hello_.scheduler() == "slurm") {
    const absl::StatusOr<SlurmPlan> plan =
        PlanForSlurm(options_.site.name, options_.site.settings, hello_.has_slurm() ? &hello_.slurm() : nullptr, v1::Resources());
    if (!plan.ok()) {
      Tell("defaults", v1::SITE_CHECK_ERROR, std::string(plan.status().message()), "change `defaults` or `partitions` in the site file");
    } else {
      *request.mutable_slurm() = plan->slurm;
    }
  }
  const absl::Status status = agent_->Diagnose(
      request,
      [&](const agent::v1::CheckResult& check) {
        if (check.name() == "clock") return;  // told by Hello already
        Tell(check.name(), ToSiteCheck(check.verdict()), check.found(), check.advice());
        if (!listening_) agent_->Close();
      },
      std::min(deadline_, absl::Now() + kDiagnoseLimit));
  if (!listening_) return absl::CancelledError("nobody waits for it any more");
  if (status.code() == absl::StatusCode::kUnimplemented) {
    Tell("checks", v1::SITE_CHECK_WARNING, "this agent is too old to examine its site", "renew it");
    return absl::OkStatus();
  }
  return status.ok() ? status : Failed("checks", status);
}

}  // namespace itwin::server

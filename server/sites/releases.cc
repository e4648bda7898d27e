#include "server/sites/releases.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/log.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "common/subprocess.h"
#include "common/version.h"
#include "server/sites/site_link.h"
#include "server/tunnel/shell_quote.h"
#include "server/tunnel/ssh_command.h"

namespace itwin::server {
namespace {

constexpr char kGreeting[] = "ITWIN-SITE 1";
constexpr int64_t kChunkBytes = 512 << 10;
constexpr absl::Duration kRenewLimit = absl::Minutes(5);
constexpr absl::Duration kCallLimit = absl::Seconds(30);
constexpr absl::Duration kOperatorsLimit = absl::Seconds(30);
constexpr int64_t kMaxOperatorsBytes = 4 << 20;

std::string OwnMachine() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "";
#endif
}

// One line for `sh`, whatever the account's shell is.
absl::StatusOr<std::string> ForSh(const std::string& script) {
  ITWIN_ASSIGN_OR_RETURN(const std::string quoted, QuoteForShell(script));
  return absl::StrCat("exec sh -c ", quoted);
}

absl::StatusOr<std::string> RunScript(const SshTunnelOptions& options, const std::string& script, absl::string_view what, absl::Time deadline) {
  ITWIN_ASSIGN_OR_RETURN(const std::string command, ForSh(script));
  ITWIN_ASSIGN_OR_RETURN(const SshCommandResult result, RunSshCommand(options, command, nullptr, deadline));
  if (result.exit_code != 0 || !result.signal.empty()) {
    const std::string words(absl::StripAsciiWhitespace(result.err.empty() ? result.out : result.err));
    return absl::FailedPreconditionError(absl::StrCat(what, " failed at the site (", result.signal.empty() ? absl::StrCat("exit code ", result.exit_code) : "signal " + result.signal,
                                                      words.empty() ? ")" : absl::StrCat("): ", words)));
  }
  return result.out;
}

absl::Status PutProgram(AgentClient* agent, const GatewayPrograms::Program& program, absl::Duration stall) {
  ITWIN_ASSIGN_OR_RETURN(const std::vector<agent::v1::InputStatus> there, agent->StatInputs({program.sha256}, absl::Now() + kCallLimit));
  if (there[0].complete()) return absl::OkStatus();
  int64_t offset = std::clamp<int64_t>(there[0].received_bytes(), 0, program.size);
  return agent->PutInput(
      program.sha256, program.size, offset,
      [&]() -> absl::StatusOr<std::string> {
        absl::StatusOr<std::string> chunk = ReadFileRange(program.path, offset, kChunkBytes);
        if (chunk.ok()) offset += static_cast<int64_t>(chunk->size());
        return chunk;
      },
      stall);
}

}  // namespace

absl::StatusOr<GatewayPrograms::Program> GatewayPrograms::Read(const std::string& path, Program* memory) {
  absl::MutexLock lock(&mu_);
  if (memory->path == path) return *memory;
  Program program{.path = path};
  ITWIN_ASSIGN_OR_RETURN(program.sha256, Sha256OfFile(path));
  struct stat stat;
  if (::stat(path.c_str(), &stat) != 0) return ErrnoStatus(errno, path);
  program.size = stat.st_size;
  *memory = program;
  return program;
}

absl::StatusOr<GatewayPrograms::Program> GatewayPrograms::Agent() {
  if (!has_agent()) {
    return absl::FailedPreconditionError(
        "this gateway has no itwin-agent to bring to sites; put it beside itwin-gateway, or name the site's own under `agent` in the site file");
  }
  return Read(agent_, &agent_read_);
}

absl::StatusOr<GatewayPrograms::Program> GatewayPrograms::WorkerFor(const SiteFile& site) {
  if (!site.worker_bundle.empty()) {
    Program fresh;
    return Read(site.worker_bundle, &fresh);
  }
  if (!site.worker_path.empty() || worker_.empty()) return Program{};
  return Read(worker_, &worker_read_);
}

absl::StatusOr<std::shared_ptr<WorkerOperators>> GatewayPrograms::OperatorsOf(const SiteFile& site) {
  std::string file = site.worker_operators;
  if (file.empty() && !site.worker_bundle.empty()) {
    file = site.worker_bundle + ".operators.json";
    if (access(file.c_str(), R_OK) != 0) return nullptr;
  }
  if (!file.empty()) {
    auto listed = std::make_shared<WorkerOperators>(file, [file] { return ReadFile(file, kMaxOperatorsBytes); });
    ITWIN_RETURN_IF_ERROR(Annotate(listed->Load(), "worker.operators"));
    return listed;
  }
  if (!site.worker_path.empty() || worker_.empty()) return nullptr;
  absl::MutexLock lock(&mu_);
  if (own_operators_ == nullptr) {
    own_operators_ = std::make_shared<WorkerOperators>(worker_, [worker = worker_]() -> absl::StatusOr<std::string> {
      SubprocessOptions options;
      options.argv = {worker, "--operators"};
      ITWIN_ASSIGN_OR_RETURN(CommandOutput output, RunCommand(options, kOperatorsLimit));
      if (output.exit.exit_code == 0 && output.exit.signal == 0 && !output.truncated) return std::move(output.out);
      return absl::FailedPreconditionError(absl::StrCat(worker, " --operators failed: ", absl::StripAsciiWhitespace(output.err)));
    });
  }
  return own_operators_;
}

std::string ReleaseName(const GatewayPrograms::Program& agent, const GatewayPrograms::Program& worker) {
  const std::string hash = worker.sha256.empty() ? agent.sha256 : Sha256Hex(absl::StrCat(agent.sha256, worker.sha256));
  return absl::StrCat(kVersion, "-", hash.substr(0, 8));
}

absl::StatusOr<LoginNode> LookAtLoginNode(const SshTunnelOptions& options, const SiteFile& site, absl::Time deadline) {
  const std::string root = ShellPath(site.root);
  ITWIN_ASSIGN_OR_RETURN(
      const std::string command,
      ForSh(absl::StrCat("echo; echo '", kGreeting, "'; echo root=", root, "; echo machine=`uname -m`; echo current=`readlink ", root,
                         "/releases/current 2>/dev/null`; echo end")));
  ITWIN_ASSIGN_OR_RETURN(const SshCommandResult result, RunSshCommand(options, command, nullptr, deadline));
  LoginNode out;
  bool greeted = false, ended = false;
  for (absl::string_view line : absl::StrSplit(result.out, '\n')) {
    line = absl::StripAsciiWhitespace(line);
    if (line == kGreeting) greeted = true;  // a shell's start files may have printed before
    if (!greeted) continue;
    const auto value = [&](absl::string_view key, std::string* into) {
      if (absl::StartsWith(line, key)) *into = std::string(line.substr(key.size()));
    };
    value("root=", &out.root);
    value("machine=", &out.machine);
    value("current=", &out.current);
    ended |= line == "end";
  }
  if (!greeted) {
    out.forced_command = true;
    // The agent's server speaks first: HTTP/2 settings, a frame of type 4.
    out.agent_answers = result.out.size() >= 9 && result.out[0] == '\0' && result.out[3] == '\4';
    const std::string& said = result.err.empty() ? result.out : result.err;
    out.said = absl::CHexEscape(absl::StripAsciiWhitespace(said.substr(0, 200)));
    return out;
  }
  if (!ended || out.root.empty() || out.root[0] != '/') {
    return absl::FailedPreconditionError(absl::StrCat("the site's shell makes '", out.root, "' of root ", site.root, ", which is no absolute path"));
  }
  return out;
}

absl::StatusOr<Installed> InstallOverSsh(const SshTunnelOptions& options, const SiteFile& site, const LoginNode& node,
                                         GatewayPrograms* programs, absl::Time deadline, const OnSent& on_sent) {
  if (!node.machine.empty() && node.machine != OwnMachine()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the login node is a ", node.machine, " machine, and this gateway has programs for ", OwnMachine(),
                     "; build itwin-agent there, and give its path under `agent` (and the worker's under worker.path) in the site file"));
  }
  ITWIN_ASSIGN_OR_RETURN(const GatewayPrograms::Program agent, programs->Agent());
  ITWIN_ASSIGN_OR_RETURN(const GatewayPrograms::Program worker, programs->WorkerFor(site));
  Installed out{.release = ReleaseName(agent, worker)};
  const std::string releases = node.root + "/releases";
  ITWIN_ASSIGN_OR_RETURN(const std::string quoted, QuoteForShell(releases));
  const std::string worker_directory = absl::StrCat("worker-", worker.sha256.substr(0, 8));

  ITWIN_ASSIGN_OR_RETURN(
      const std::string there,
      RunScript(options,
                absl::StrCat("umask 077; mkdir -p ", quoted, " && cd ", quoted, " || exit 1; test -x ", out.release, "/itwin-agent && echo release; ",
                             "test -x ", worker_directory, "/itwin-worker && echo worker; readlink current; true"),
                absl::StrCat("making ", releases), deadline));
  const std::vector<std::string> lines = absl::StrSplit(there, '\n');
  const auto has = [&](const std::string& line) { return std::find(lines.begin(), lines.end(), line) != lines.end(); };
  const bool release_there = has("release");
  const bool worker_there = worker.path.empty() || has("worker");
  out.was_there = release_there && worker_there;
  if (out.was_there && has(out.release)) return out;

  const int64_t total = (release_there ? 0 : agent.size) + (worker_there ? 0 : worker.size);
  int64_t before = 0;
  bool stopped = false;
  const auto sent = [&](int64_t now, int64_t) {
    if (!stopped && on_sent && !on_sent(before + now, total)) stopped = true;
  };
  std::string script = absl::StrCat("set -e; umask 077; cd ", quoted, "; ");
  if (!worker_there) {
    const bool bundle = !site.worker_bundle.empty();
    const std::string making = absl::StrCat(".", worker_directory, ".new");
    const std::string file = bundle ? "bundle.tar.gz" : "itwin-worker";
    ITWIN_RETURN_IF_ERROR(Annotate(UploadFile(options, worker.path, absl::StrCat(releases, "/", making, "/", file), 0700, deadline, sent), "itwin-worker"));
    if (stopped) return absl::CancelledError("nobody waits for it any more");
    before += worker.size;
    if (bundle) absl::StrAppend(&script, "(cd ", making, "; gzip -dc ", file, " | tar -xf -; rm -f ", file, "; test -x itwin-worker); ");
    absl::StrAppend(&script, "if test -d ", worker_directory, "; then rm -rf ", making, "; else mv ", making, " ", worker_directory, "; fi; ");
  }
  if (!release_there) {
    const std::string making = absl::StrCat(".", out.release, ".new");
    ITWIN_RETURN_IF_ERROR(Annotate(UploadFile(options, agent.path, absl::StrCat(releases, "/", making, "/itwin-agent"), 0700, deadline, sent), "itwin-agent"));
    if (stopped) return absl::CancelledError("nobody waits for it any more");
    if (!worker.path.empty()) absl::StrAppend(&script, "ln -sfn ../", worker_directory, "/itwin-worker ", making, "/itwin-worker; ");
    absl::StrAppend(&script, "if test -d ", out.release, "; then rm -rf ", making, "; else mv ", making, " ", out.release, "; fi; ");
  }
  absl::StrAppend(&script, "ln -s ", out.release, " .current.$$; mv -fT .current.$$ current");
  ITWIN_RETURN_IF_ERROR(RunScript(options, script, "installing", deadline).status());
  return out;
}

absl::StatusOr<Installed> InstallOverAgent(AgentClient* agent, const SiteFile& site, GatewayPrograms* programs, absl::Duration stall) {
  ITWIN_ASSIGN_OR_RETURN(const GatewayPrograms::Program program, programs->Agent());
  // A bundle is no single program; what is there of it goes on.
  GatewayPrograms::Program worker;
  if (site.worker_bundle.empty()) {
    ITWIN_ASSIGN_OR_RETURN(worker, programs->WorkerFor(site));
  }
  agent::v1::InstallReleaseRequest request;
  request.set_name(ReleaseName(program, worker));
  request.add_carry("itwin-worker");
  for (const auto& [name, one] : {std::pair<const char*, const GatewayPrograms::Program&>{"itwin-agent", program}, {"itwin-worker", worker}}) {
    if (one.path.empty()) continue;
    ITWIN_RETURN_IF_ERROR(Annotate(PutProgram(agent, one, stall), name));
    agent::v1::StagedInput* file = request.add_files();
    file->set_path(name);
    file->set_sha256(one.sha256);
    file->set_executable(true);
  }
  ITWIN_RETURN_IF_ERROR(agent->InstallRelease(request, absl::Now() + kRenewLimit).status());
  return Installed{.release = request.name()};
}

absl::StatusOr<bool> AgentRenewal::Renew(AgentClient* agent, const agent::v1::HelloResponse& hello) {
  if (hello.agent_sha256().empty() || !programs_->has_agent()) return false;  // it cannot say what it is, or there is nothing better
  ITWIN_ASSIGN_OR_RETURN(const GatewayPrograms::Program own, programs_->Agent());
  if (hello.agent_sha256() == own.sha256 || hello.agent_sha256() == tried_) return false;
  if (CompareVersions(hello.agent_version(), kVersion) > 0) return false;  // another gateway is newer than we are
  tried_ = hello.agent_sha256();
  const std::string from = absl::StrCat(hello.agent_version(), " (", hello.agent_sha256().substr(0, 8), ")");
  const std::string to = absl::StrCat(kVersion, " (", own.sha256.substr(0, 8), ")");
  if (absl::StartsWith(hello.agent_program(), hello.spool() + "/releases/")) {
    absl::StatusOr<Installed> installed = absl::UnavailableError("not tried");
    if (site_.installs()) {
      ITWIN_ASSIGN_OR_RETURN(const SshTunnelOptions options, SshOptionsOf(site_));
      const absl::Time deadline = absl::Now() + kRenewLimit;
      ITWIN_ASSIGN_OR_RETURN(const LoginNode node, LookAtLoginNode(options, site_, deadline));
      if (!node.forced_command) installed = InstallOverSsh(options, site_, node, programs_, deadline, nullptr);
    }
    if (!installed.ok()) installed = InstallOverAgent(agent, site_, programs_, kCallLimit);
    if (!installed.ok()) return Annotate(installed.status(), absl::StrCat("from ", from, " to ", to));
  }
  // An agent that lies elsewhere was perhaps renewed there, and the daemon is of the file before.
  ITWIN_RETURN_IF_ERROR(Annotate(agent->Retire(absl::Now() + kCallLimit), absl::StrCat("from ", from, " to ", to)));
  log::Info("site {}: its agent goes from {} to {}; attempts go on", site_.name, from, to);
  return true;
}

int CompareVersions(absl::string_view a, absl::string_view b) {
  const std::vector<absl::string_view> left = absl::StrSplit(a, '.'), right = absl::StrSplit(b, '.');
  for (size_t i = 0; i < std::max(left.size(), right.size()); ++i) {
    int l = 0, r = 0;
    if (i < left.size() && !absl::SimpleAtoi(left[i], &l)) return 0;
    if (i < right.size() && !absl::SimpleAtoi(right[i], &r)) return 0;
    if (l != r) return l < r ? -1 : 1;
  }
  return 0;
}

}  // namespace itwin::server

// itwin-agent: the daemon of a site, how to reach it, and the process that runs one attempt.
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "agent/agent.h"
#include "agent/rpc/admin.h"
#include "agent/rpc/connect.h"
#include "agent/scheduler/supervisor.h"
#include "common/log.h"
#include "common/version.h"

namespace itwin::agent {
namespace {

constexpr int kExitFailed = 1;
constexpr int kExitOtherAgent = 3;  // read by `connect`
constexpr int64_t kMaxLogBytes = 4 << 20;
constexpr unsigned kStopSeconds = 20;
constexpr absl::Duration kTakeoverLimit = absl::Seconds(60);

struct Flags {
  std::string root;
  std::string scheduler = "process";
  int slots = 0;
  std::string worker;
  std::string launcher = LaunchOptions().launcher;
  std::string grace = "10s";
  std::string idle_exit = "0";
  std::string input_retention = "168h";
  std::string log_level = "info";
  std::string stop_limit = "60s";
  bool detached = false;
  bool kill_jobs = false;
  bool json = false;
  std::string attempt_directory;
};

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "itwin-agent: %s\n", std::string(status.message()).c_str());
  return absl::IsAlreadyExists(status) ? kExitOtherAgent : kExitFailed;
}

std::string OwnProgram() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).string();
}

std::string Absolute(const std::string& path) {
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(path, error).lexically_normal();
  return absolute.filename().empty() ? absolute.parent_path().string() : absolute.string();
}

// Beside this program, else in PATH, else none.
std::string FindWorker() {
  std::vector<std::string> places = {std::filesystem::path(OwnProgram()).parent_path().string()};
  const char* path = getenv("PATH");
  for (absl::string_view part : absl::StrSplit(path == nullptr ? "" : path, ':', absl::SkipEmpty())) {
    places.emplace_back(part);
  }
  for (const std::string& place : places) {
    const std::string candidate = place + "/itwin-worker";
    if (access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return "";
}

int DefaultSlots() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

absl::StatusOr<LaunchOptions> LaunchOptionsFrom(const Flags& flags) {
  LaunchOptions out{.worker = flags.worker.empty() ? "" : Absolute(flags.worker), .launcher = flags.launcher};
  if (!absl::ParseDuration(flags.grace, &out.grace) || out.grace < absl::ZeroDuration()) {
    return absl::InvalidArgumentError(absl::StrCat("--grace is '", flags.grace, "'; write a duration like 10s"));
  }
  return out;
}

// What a caller that started us may have left open would otherwise stay open as long as we live.
void CloseInherited() {
  std::vector<int> open;
  std::error_code error;
  for (std::filesystem::directory_iterator it("/proc/self/fd", error), end; !error && it != end; it.increment(error)) {
    const int fd = atoi(it->path().filename().c_str());
    if (fd > 2) open.push_back(fd);
  }
  for (int fd : open) close(fd);
}

int Serve(const Flags& flags) {
  if (flags.detached) {
    CloseInherited();
    if (chdir("/") != 0) return kExitFailed;
    const absl::Status log = InitFileLog("itwin-agent", flags.log_level, flags.root + "/agent.log", kMaxLogBytes);
    if (!log.ok()) return Fail(log);
  }
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGHUP, SIG_IGN);
  FileDescriptor signals(signalfd(-1, &set, SFD_CLOEXEC));

  Flags found = flags;
  if (found.worker.empty()) found.worker = FindWorker();
  const absl::StatusOr<LaunchOptions> launch = LaunchOptionsFrom(found);
  if (!launch.ok()) return Fail(launch.status());
  absl::Duration idle;
  if (!absl::ParseDuration(flags.idle_exit, &idle)) {
    return Fail(absl::InvalidArgumentError(
        absl::StrCat("--idle-exit is '", flags.idle_exit, "'; write a duration like 10m, or 0 for never")));
  }
  absl::Duration input_retention;
  if (!absl::ParseDuration(flags.input_retention, &input_retention) || input_retention < absl::ZeroDuration()) {
    return Fail(absl::InvalidArgumentError(absl::StrCat("--input-retention is '", flags.input_retention,
                                                        "'; write a duration like 168h, or 0 for ever")));
  }
  absl::StatusOr<std::unique_ptr<Agent>> agent =
      Agent::Start({.root = flags.root,
                    .scheduler = flags.scheduler,
                    .slots = flags.slots > 0 ? flags.slots : DefaultSlots(),
                    .agent_program = OwnProgram(),
                    .launch = *launch,
                    .takeover_limit = flags.detached ? kTakeoverLimit : kTakeoverLimit / 2,
                    .input_retention = input_retention > absl::ZeroDuration() ? input_retention : absl::InfiniteDuration(),
                    .idle_exit = idle > absl::ZeroDuration() ? idle : absl::InfiniteDuration()});
  if (!agent.ok()) {
    log::Error("{}", std::string(agent.status().message()));
    return absl::IsAlreadyExists(agent.status()) ? kExitOtherAgent : kExitFailed;
  }
  (*agent)->Wait(signals.get());
  // A command of the scheduler that hangs must not keep us: whatever we are at, the next agent goes on from the spool.
  signal(SIGALRM, SIG_DFL);
  alarm(kStopSeconds);
  (*agent)->Stop();
  return 0;
}

ConnectOptions ConnectOptionsFrom(const Flags& flags) {
  ConnectOptions out{.root = flags.root, .agent_program = OwnProgram()};
  out.serve_flags.push_back("--scheduler=" + flags.scheduler);
  if (flags.slots > 0) out.serve_flags.push_back(absl::StrCat("--slots=", flags.slots));
  if (!flags.worker.empty()) out.serve_flags.push_back("--worker=" + Absolute(flags.worker));
  if (flags.launcher != LaunchOptions().launcher) out.serve_flags.push_back("--launcher=" + flags.launcher);
  out.serve_flags.push_back("--grace=" + flags.grace);
  out.serve_flags.push_back("--idle-exit=" + flags.idle_exit);
  out.serve_flags.push_back("--input-retention=" + flags.input_retention);
  out.serve_flags.push_back("--log-level=" + flags.log_level);
  return out;
}

int Connect(const Flags& flags) {
  signal(SIGPIPE, SIG_IGN);
  const absl::StatusOr<FileDescriptor> socket = ConnectToAgent(ConnectOptionsFrom(flags));
  if (!socket.ok()) return Fail(socket.status());
  const absl::Status relayed = Relay(STDIN_FILENO, STDOUT_FILENO, socket->get());
  return relayed.ok() ? 0 : Fail(relayed);
}

int Tell(const absl::Status& status, const std::string& words) {
  std::fputs(words.c_str(), stdout);
  return status.ok() ? 0 : Fail(status);
}

int Run(int argc, char** argv) {
  Flags flags;
  CLI::App app("The agent of a site: runs jobs on this machine for a gateway that connects to it.", "itwin-agent");
  app.require_subcommand(1);
  const auto root_flag = [&](CLI::App* command) {
    command->add_option("--root", flags.root, "directory of the spool")->required();
  };
  const auto launch_flags = [&](CLI::App* command) {
    command->add_option("--worker", flags.worker, "path of itwin-worker (default: beside this program, or in PATH)");
    command->add_option("--launcher", flags.launcher,
                        "line that starts the ranks; {ranks}, {nodes}, {ranks_per_node}, {cpus_per_rank} are filled in")
        ->capture_default_str();
    command->add_option("--grace", flags.grace, "from SIGTERM to SIGKILL")->capture_default_str();
  };
  const auto serve_flags = [&](CLI::App* command) {
    root_flag(command);
    launch_flags(command);
    command
        ->add_option("--scheduler", flags.scheduler,
                     "who runs the jobs: process (this machine), slurm, or auto (slurm where sbatch is found)")
        ->check(CLI::IsMember({"auto", "slurm", "process"}))
        ->capture_default_str();
    command->add_option("--slots", flags.slots, "ranks that may run at once (default: the cores of this machine)")
        ->check(CLI::Range(1, 1'000'000));
    command->add_option("--idle-exit", flags.idle_exit, "end after this long without connections and jobs; 0: never")
        ->capture_default_str();
    command->add_option("--input-retention", flags.input_retention,
                        "how long input files stay here that no attempt links to and nobody has asked for; 0: for ever")
        ->capture_default_str();
    command->add_option("--log-level", flags.log_level, "debug, info, warning, error")->capture_default_str();
  };
  CLI::App* serve = app.add_subcommand("serve", "run the daemon in the foreground");
  serve_flags(serve);
  serve->add_flag("--detached", flags.detached, "as `connect` starts it: log into ROOT/agent.log")->group("");
  CLI::App* connect = app.add_subcommand(
      "connect", "join standard input and output to the daemon, starting it when none lives");
  serve_flags(connect);
  CLI::App* stop = app.add_subcommand("stop", "end the daemon; running jobs go on");
  root_flag(stop);
  stop->add_flag("--kill-jobs", flags.kill_jobs, "cancel all unfinished jobs first");
  stop->add_option("--timeout", flags.stop_limit, "how long to wait")->capture_default_str();
  CLI::App* status = app.add_subcommand("status", "say whether a daemon lives and what it does");
  root_flag(status);
  status->add_flag("--json", flags.json, "as one JSON object");
  CLI::App* run_attempt = app.add_subcommand("run-attempt", "what the script of an attempt runs");
  run_attempt->add_option("directory", flags.attempt_directory, "directory of the attempt")->required();
  launch_flags(run_attempt);
  CLI::App* version = app.add_subcommand("version", "print the version");
  CLI11_PARSE(app, argc, argv);

  if (absl::Status log = InitLog("itwin-agent", flags.log_level); !log.ok()) return Fail(log);
  if (!flags.root.empty()) flags.root = Absolute(flags.root);
  if (*version) {
    std::printf("itwin-agent %s\n", kVersion);
    return 0;
  }
  if (*serve) return Serve(flags);
  if (*connect) return Connect(flags);
  if (*stop) {
    absl::Duration limit;
    if (!absl::ParseDuration(flags.stop_limit, &limit)) {
      return Fail(absl::InvalidArgumentError("--timeout takes a duration like 60s"));
    }
    std::string words;
    const absl::Status stopped = StopAgent(ConnectOptionsFrom(flags), flags.kill_jobs, limit, &words);
    return Tell(stopped, words);
  }
  if (*status) {
    std::string words;
    const absl::Status described = DescribeAgent(ConnectOptionsFrom(flags), flags.json, &words);
    return Tell(described, words);
  }
  if (*run_attempt) {
    const absl::StatusOr<AttemptDirectory> directory = AttemptDirectory::FromPath(flags.attempt_directory);
    if (!directory.ok()) return Fail(directory.status());
    const absl::StatusOr<LaunchOptions> launch = LaunchOptionsFrom(flags);
    if (!launch.ok()) return Fail(launch.status());
    return RunAttempt(*directory, *launch);
  }
  return kExitFailed;
}

}  // namespace
}  // namespace itwin::agent

int main(int argc, char** argv) {
  // As in the gateway: not a search for cycles at every lock.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  try {
    return itwin::agent::Run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "itwin-agent: %s\n", e.what());
    return 1;
  }
}

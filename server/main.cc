// itwin-gateway: flags and files become options; everything else is elsewhere.
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "common/version.h"
#include "server/config.h"
#include "server/gateway.h"
#include "server/init.h"
#include "server/store/sqlite_job_store.h"

namespace itwin::server {
namespace {

struct Flags {
  std::string data;
  std::string config;
  ConfigOverrides overrides;
  bool check_config = false;
  bool no_local = false;
  // init
  std::vector<std::string> hosts;
  std::string user;
  bool install_client = false;
  // token
  std::string token_name;
  bool admin = false;
  // accept-spool
  std::string site;
  // backup
  std::string backup_path;
  // stop
  double stop_seconds = 30;
};

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "itwin-gateway: %s\n", std::string(status.message()).c_str());
  return 1;
}

std::string DefaultData() {
  const char* xdg = getenv("XDG_DATA_HOME");
  if (xdg != nullptr && *xdg == '/') return absl::StrCat(xdg, "/itwin");
  const char* home = getenv("HOME");
  return absl::StrCat(home != nullptr ? home : "", "/.local/share/itwin");
}

absl::StatusOr<GatewayConfig> LoadConfig(const Flags& flags) {
  const std::string path = flags.config.empty() ? DataDirectory{flags.data}.config() : flags.config;
  if (!flags.config.empty() && access(path.c_str(), R_OK) != 0) {
    return ErrnoStatus(errno, absl::StrCat("configuration ", path));
  }
  ITWIN_ASSIGN_OR_RETURN(GatewayConfig config, ReadConfig(path));
  ConfigOverrides overrides = flags.overrides;
  if (flags.no_local) overrides.local = false;
  Apply(overrides, &config);
  ITWIN_RETURN_IF_ERROR(CheckConfig(config));
  return config;
}

absl::StatusOr<std::unique_ptr<SqliteJobStore>> OpenBeside(const Flags& flags) {
  const DataDirectory data{flags.data};
  if (access(data.database().c_str(), F_OK) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(data.database(), " is missing; run first: itwin-gateway init --data ", flags.data));
  }
  SqliteJobStore::Options options;
  options.path = data.database();
  options.exclusive = false;
  options.readers = 1;
  return SqliteJobStore::Open(options);
}

int RunInit(const Flags& flags) {
  const absl::StatusOr<GatewayConfig> config = LoadConfig(flags);
  if (!config.ok()) return Fail(config.status());
  InitOptions options;
  options.data = flags.data;
  options.listen = config->listen;
  options.hosts = flags.hosts;
  options.user = flags.user;
  options.install_client = flags.install_client;
  const absl::StatusOr<InitReport> report = Init(options);
  if (!report.ok()) return Fail(report.status());
  if (report->done.empty()) {
    std::printf("%s is ready; nothing had to be made.\n", flags.data.c_str());
  } else {
    std::printf("%s is ready. Made: %s.\n", flags.data.c_str(), absl::StrJoin(report->done, "; ").c_str());
  }
  std::printf("Start the gateway:    itwin-gateway serve --data %s\n", flags.data.c_str());
  if (!report->installed_config.empty()) {
    std::printf("Clients of this account find it by %s.\n", report->installed_config.c_str());
  } else {
    std::printf("Clients find it with: export ITWIN_CONFIG=%s\n", report->client_config.c_str());
  }
  return 0;
}

int RunServe(const Flags& flags) {
  const absl::StatusOr<GatewayConfig> config = LoadConfig(flags);
  if (!config.ok()) return Fail(config.status());
  if (flags.check_config) {
    std::printf("the configuration is good\n");
    return 0;
  }
  if (const absl::Status log = InitLog("itwin-gateway", config->log_level); !log.ok()) return Fail(log);
  // Signals are read like any input; threads inherit the mask, children do not.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  const FileDescriptor signal_fd(signalfd(-1, &signals, SFD_CLOEXEC));

  Gateway::Options options;
  options.data = flags.data;
  options.config = *config;
  absl::StatusOr<std::unique_ptr<Gateway>> gateway = Gateway::Create(options);
  if (!gateway.ok()) return Fail(gateway.status());
  log::Info("itwin-gateway {} serves {} at {}", kVersion, flags.data, (*gateway)->endpoint());

  signalfd_siginfo info;
  ssize_t got;
  do {
    got = read(signal_fd.get(), &info, sizeof info);
  } while (got < 0 && errno == EINTR);
  log::Info("stopping: finishing calls under way; jobs go on at their sites");
  (*gateway)->Stop();
  log::Info("stopped");
  return 0;
}

int RunStop(const Flags& flags) {
  const DataDirectory data{flags.data};
  const absl::StatusOr<FileDescriptor> lock = OpenFile(data.run("lock"), O_RDWR);
  if (!lock.ok() || flock(lock->get(), LOCK_EX | LOCK_NB) == 0) {
    std::printf("no gateway serves %s\n", flags.data.c_str());
    return 0;
  }
  const absl::StatusOr<std::string> text = ReadFile(data.run("pid"), 64);
  int pid = 0;
  if (!text.ok() || !absl::SimpleAtoi(absl::StripAsciiWhitespace(*text), &pid) || pid <= 1) {
    return Fail(absl::UnavailableError(absl::StrCat("a gateway serves ", flags.data, " but has not written its process id yet; try again")));
  }
  if (kill(pid, SIGTERM) != 0 && errno != ESRCH) return Fail(ErrnoStatus(errno, absl::StrCat("stopping process ", pid)));
  // The lock is free when it has ended, however it ends.
  const absl::Time deadline = absl::Now() + absl::Seconds(flags.stop_seconds);
  while (flock(lock->get(), LOCK_EX | LOCK_NB) != 0) {
    if (absl::Now() > deadline) {
      return Fail(absl::DeadlineExceededError(absl::StrCat("process ", pid, " has not ended within ", flags.stop_seconds, " s")));
    }
    absl::SleepFor(absl::Milliseconds(20));
  }
  std::printf("stopped; its jobs go on at their sites\n");
  return 0;
}

int RunTokenAdd(const Flags& flags) {
  const auto store = OpenBeside(flags);
  if (!store.ok()) return Fail(store.status());
  const auto token = AddToken(store->get(), flags.token_name, flags.admin ? TokenRole::kAdmin : TokenRole::kUser);
  if (!token.ok()) return Fail(token.status());
  // The text alone goes to standard output, so that it can be piped into a file.
  std::fprintf(stderr, "token for '%s'; it is shown only now. Put it into a file that only its user can read.\n", flags.token_name.c_str());
  std::printf("%s\n", token->c_str());
  return 0;
}

int RunTokenList(const Flags& flags) {
  const auto store = OpenBeside(flags);
  if (!store.ok()) return Fail(store.status());
  const auto tokens = (*store)->ListTokens();
  if (!tokens.ok()) return Fail(tokens.status());
  std::printf("%-24s %-6s %-20s %s\n", "NAME", "ROLE", "CREATED", "REVOKED");
  const auto when = [](absl::Time t) { return absl::FormatTime("%Y-%m-%d %H:%M:%S", t, absl::LocalTimeZone()); };
  for (const TokenRow& token : *tokens) {
    std::printf("%-24s %-6s %-20s %s\n", token.name.c_str(), token.role == TokenRole::kAdmin ? "admin" : "user",
                when(token.created).c_str(), token.revoked == absl::InfiniteFuture() ? "" : when(token.revoked).c_str());
  }
  return 0;
}

int RunTokenRevoke(const Flags& flags) {
  const auto store = OpenBeside(flags);
  if (!store.ok()) return Fail(store.status());
  if (const absl::Status status = (*store)->RevokeToken(flags.token_name); !status.ok()) return Fail(status);
  std::printf("'%s' is revoked; a running gateway refuses it within seconds\n", flags.token_name.c_str());
  return 0;
}

int RunAcceptSpool(const Flags& flags) {
  const auto store = OpenBeside(flags);
  if (!store.ok()) return Fail(store.status());
  if (const absl::Status status = (*store)->ForgetSpool(flags.site); !status.ok()) return Fail(status);
  std::printf("the spool that site %s shows next is its own; attempts that are not in it will count as lost\n",
              flags.site.c_str());
  return 0;
}

int RunBackup(const Flags& flags) {
  const auto store = OpenBeside(flags);
  if (!store.ok()) return Fail(store.status());
  if (const absl::Status status = (*store)->Backup(flags.backup_path); !status.ok()) return Fail(status);
  std::printf("%s is a consistent copy of the database; artifacts lie in %s/blobs and never change\n",
              flags.backup_path.c_str(), flags.data.c_str());
  return 0;
}

int RunVerify(const Flags& flags) {
  const auto store = OpenBeside(flags);
  if (!store.ok()) return Fail(store.status());
  if (const absl::Status status = (*store)->Verify(/*all=*/true); !status.ok()) return Fail(status);
  std::printf("every job's record follows from its events\n");
  return 0;
}

int Run(int argc, char** argv) {
  Flags flags;
  flags.data = DefaultData();
  CLI::App app("Takes jobs, runs them at its sites, and keeps what they give.", "itwin-gateway");
  app.require_subcommand(0, 1);
  app.set_version_flag("--version", kVersion);
  app.add_flag("--check-config", flags.check_config, "as `check-config`")->group("");
  const auto common = [&](CLI::App* command) {
    command->add_option("--data", flags.data, "data directory")->envname("ITWIN_GATEWAY_DATA")->capture_default_str();
    return command;
  };
  const auto configured = [&](CLI::App* command) {
    common(command);
    command->add_option("--config", flags.config, "configuration (default: <data>/gateway.yaml)")->envname("ITWIN_GATEWAY_CONFIG");
    command->add_option("--listen", flags.overrides.listen, "address, for example 127.0.0.1:7443; port 0: any free one")
        ->envname("ITWIN_GATEWAY_LISTEN");
    command->add_option("--log-level", flags.overrides.log_level, "debug, info, warning, error")->envname("ITWIN_GATEWAY_LOG_LEVEL");
    command->add_option("--slots", flags.overrides.slots, "ranks that run at once at the embedded site")
        ->envname("ITWIN_GATEWAY_SLOTS");
    command->add_flag("--no-local", flags.no_local, "without the embedded site");
    return command;
  };
  configured(&app)->configurable(false);
  CLI::App* init = configured(app.add_subcommand("init", "make a data directory: database, TLS, first token, client configuration"));
  init->add_option("--host", flags.hosts, "further names or addresses under which clients reach the gateway");
  init->add_option("--user", flags.user, "name of the first token (default: your account's)");
  init->add_flag("--install-client", flags.install_client, "also copy the client configuration to ~/.config/itwin");
  CLI::App* serve = configured(app.add_subcommand("serve", "run the gateway in the foreground"));
  serve->add_flag("--check-config", flags.check_config, "only say whether the configuration is good");
  CLI::App* check = configured(app.add_subcommand("check-config", "say whether the configuration is good"));
  CLI::App* stop = common(app.add_subcommand("stop", "stop the gateway of a data directory; jobs go on"));
  stop->add_option("--timeout", flags.stop_seconds, "seconds to wait")->capture_default_str();
  CLI::App* token = app.add_subcommand("token", "who may call");
  token->require_subcommand(1);
  CLI::App* token_add = common(token->add_subcommand("add", "make a token and print it"));
  token_add->add_option("name", flags.token_name, "owner of the jobs submitted with it")->required();
  token_add->add_flag("--admin", flags.admin, "may see and move everybody's jobs");
  CLI::App* token_list = common(token->add_subcommand("list", "names, roles, dates"));
  CLI::App* token_revoke = common(token->add_subcommand("revoke", "refuse a token from now on"));
  token_revoke->add_option("name", flags.token_name, "its name")->required();
  CLI::App* accept_spool =
      common(app.add_subcommand("accept-spool", "take the spool that a site shows now for its own, after it was made anew"));
  accept_spool->add_option("site", flags.site, "name of the site")->required();
  CLI::App* backup = common(app.add_subcommand("backup", "copy the database while the gateway runs"));
  backup->add_option("path", flags.backup_path, "file to make")->required();
  CLI::App* verify = common(app.add_subcommand("verify", "check that every job's record follows from its events"));
  CLI11_PARSE(app, argc, argv);

  std::error_code error;
  flags.data = std::filesystem::absolute(flags.data, error).lexically_normal().string();
  while (flags.data.size() > 1 && flags.data.back() == '/') flags.data.pop_back();
  // Short commands say what matters themselves.
  if (const absl::Status log = InitLog("itwin-gateway", "warning"); !log.ok()) return Fail(log);
  if (*init) return RunInit(flags);
  if (*check) flags.check_config = true;
  if (*serve || flags.check_config) return RunServe(flags);
  if (*stop) return RunStop(flags);
  if (*token_add) return RunTokenAdd(flags);
  if (*token_list) return RunTokenList(flags);
  if (*token_revoke) return RunTokenRevoke(flags);
  if (*accept_spool) return RunAcceptSpool(flags);
  if (*backup) return RunBackup(flags);
  if (*verify) return RunVerify(flags);
  std::printf("%s", app.help().c_str());
  return 2;
}

}  // namespace
}  // namespace itwin::server

int main(int argc, char** argv) {
  // Debian's absl looks for cycles among locks at every lock, behind one lock of its own. Tests keep that.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  try {
    return itwin::server::Run(argc, argv);
  } catch (const std::exception& error) {  // a library's; ours are statuses
    std::fprintf(stderr, "itwin-gateway: %s\n", error.what());
    return 1;
  }
}

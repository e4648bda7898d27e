#include "server/sites/site_file.h"

#include <errno.h>
#include <sys/stat.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/files.h"
#include "common/spec/nearest_name.h"
#include "common/spec/validate.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

constexpr int64_t kMaxFileBytes = 256 << 10;
constexpr size_t kMaxHosts = 16;
constexpr size_t kMaxPartitions = 200;
constexpr size_t kMaxEnv = 256;

bool All(absl::string_view text, absl::string_view more) {
  return std::all_of(text.begin(), text.end(), [&](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains(more, absl::string_view(&c, 1));
  });
}

// Files of the gateway's machine: `~/` is the home of its account.
std::string LocalPath(const std::string& path) {
  if (!absl::StartsWith(path, "~/")) return path;
  const char* home = getenv("HOME");
  return absl::StrCat(home != nullptr ? home : "", path.substr(1));
}

absl::Status CheckSecretFile(const char* key, const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  struct stat stat;
  if (::stat(path.c_str(), &stat) != 0) {
    return Annotate(ErrnoStatus(errno, path), absl::StrCat("ssh.", key, ", a file of the gateway's machine"));
  }
  if (!S_ISREG(stat.st_mode)) return absl::InvalidArgumentError(absl::StrCat("ssh.", key, ": ", path, " is no file"));
  if ((stat.st_mode & 077) != 0) {
    return absl::PermissionDeniedError(absl::StrFormat(
        "ssh.%s: %s can be used by others (mode %04o); run on the gateway's machine: chmod 600 %s", key, path, stat.st_mode & 07777, path));
  }
  return absl::OkStatus();
}

bool IsShellPath(absl::string_view path) {
  // Letters, digits and a few signs, so that no quoting anywhere can go wrong; `$NAME` and a leading `~/` are the shell's.
  if (!(absl::StartsWith(path, "/") || absl::StartsWith(path, "~/") || absl::StartsWith(path, "$"))) return false;
  if (path.size() > 1024 || path == "/") return false;
  const absl::string_view rest = absl::StartsWith(path, "~/") ? path.substr(1) : path;
  for (size_t i = 0; i < rest.size(); ++i) {
    const char c = rest[i];
    if (c == '$') {
      if (i + 1 >= rest.size() || !(absl::ascii_isalpha(static_cast<unsigned char>(rest[i + 1])) || rest[i + 1] == '_')) return false;
    } else if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && !absl::StrContains("/._-+=@,", absl::string_view(&c, 1))) {
      return false;
    }
  }
  return true;
}

bool HasControl(absl::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return absl::ascii_iscntrl(static_cast<unsigned char>(c)); });
}

}  // namespace

bool IsSiteName(absl::string_view name) {
  return !name.empty() && name.size() <= 63 && name[0] != '.' && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
  });
}

std::string SiteFile::address() const {
  if (!ssh) return absl::StrJoin(command, " ");
  return absl::StrCat("ssh ", ssh->user.empty() ? "" : ssh->user + "@", absl::StrJoin(ssh->hosts, ", "),
                      ssh->port == 22 ? "" : absl::StrCat(" port ", ssh->port), ssh->jump.empty() ? "" : " by " + ssh->jump);
}

StrictYaml::Take SiteKeys(StrictYaml* reader, SiteFile* out) {
  return [reader, out](const YAML::Node& node, const std::string& path) {
    StrictYaml& r = *reader;
    SiteSettings& settings = out->settings;
    const auto words_into = [&](auto* repeated) -> StrictYaml::Take {
      return [&r, repeated](const YAML::Node& value, const std::string& where) {
        std::vector<std::string> words;
        r.Words(&words, "[a, b]")(value, where);
        for (std::string& word : words) repeated->Add(std::move(word));
      };
    };
    const auto optional_words = [&](std::optional<std::vector<std::string>>* list) -> StrictYaml::Take {
      return [&r, list](const YAML::Node& value, const std::string& where) { r.Words(&list->emplace(), "[a, b]")(value, where); };
    };
    std::vector<std::string> modules;

    const StrictYaml::Take ssh = [&](const YAML::Node& value, const std::string& where) {
      SshSettings& s = out->ssh.emplace();
      const StrictYaml::Take fingerprints = [&](const YAML::Node& one, const std::string& at) {
        if (one.IsScalar()) return r.Text(&s.fingerprints.emplace_back())(one, at);
        r.Words(&s.fingerprints, "[SHA256:…, SHA256:…], or one of them")(one, at);
      };
      r.Mapping(value, where,
                {{"hosts", r.Words(&s.hosts, "[login1.example, login2.example]")},
                 {"user", r.Text(&s.user)},
                 {"port", r.Integer(&s.port)},
                 {"key", r.Text(&s.key)},
                 {"certificate", r.Text(&s.certificate)},
                 {"passphrase_file", r.Text(&s.passphrase_file)},
                 {"agent", r.Boolean(&s.agent)},
                 {"known_hosts", r.Text(&s.known_hosts)},
                 {"fingerprint", fingerprints},
                 {"jump", r.Text(&s.jump)},
                 {"one_time_code_program", r.Text(&s.one_time_code_program)},
                 {"keepalive", r.Time(&s.keepalive)}});
      for (std::string* file : {&s.key, &s.certificate, &s.passphrase_file, &s.known_hosts, &s.one_time_code_program}) *file = LocalPath(*file);
    };
    const StrictYaml::Take worker = [&](const YAML::Node& value, const std::string& where) {
      r.Mapping(value, where, {{"path", r.Text(&out->worker_path)},
                                {"bundle", r.Text(&out->worker_bundle)},
                                {"operators", r.Text(&out->worker_operators)}});
      for (std::string* file : {&out->worker_bundle, &out->worker_operators}) *file = LocalPath(*file);
    };
    const StrictYaml::Take partitions = [&](const YAML::Node& value, const std::string& where) {
      r.Entries(value, where, kMaxPartitions, [&](const std::string& key, const YAML::Node& one, const std::string& at) {
        PartitionLimits& limits = settings.partitions.emplace_back();
        limits.name = key;
        r.Mapping(one, at,
                  {{"max_time", r.Time(&limits.max_time)},
                   {"max_nodes", r.Integer(&limits.max_nodes)},
                   {"cpus_per_node", r.Integer(&limits.cpus_per_node)},
                   {"memory_per_node", r.Mebibytes(&limits.memory_mib_per_node)},
                   {"gpus_per_node", r.Integer(&limits.gpus_per_node)}});
      });
    };
    agent::v1::SlurmSettings& slurm = settings.slurm;
    const StrictYaml::Take defaults = [&](const YAML::Node& value, const std::string& where) {
      bool exclusive = false;
      r.Mapping(value, where,
                {{"partition", r.Text(slurm.mutable_partition())},
                 {"account", r.Text(slurm.mutable_account())},
                 {"qos", r.Text(slurm.mutable_qos())},
                 {"reservation", r.Text(slurm.mutable_reservation())},
                 {"constraint", r.Text(slurm.mutable_constraint())},
                 {"gpu_type", r.Text(slurm.mutable_gpu_type())},
                 {"exclusive", r.Boolean(&exclusive)},
                 {"exclude_nodes", words_into(slurm.mutable_exclude_nodes())},
                 {"options", words_into(slurm.mutable_options())},
                 {"time", r.Time(&settings.default_time)},
                 {"memory", r.Mebibytes(&settings.default_memory_mib)}});
      slurm.set_exclusive(exclusive);
    };
    const StrictYaml::Take allow = [&](const YAML::Node& value, const std::string& where) {
      r.Mapping(value, where,
                {{"partitions", optional_words(&settings.allowed_partitions)},
                 {"accounts", optional_words(&settings.allowed_accounts)},
                 {"qos", optional_words(&settings.allowed_qos)},
                 {"reservations", optional_words(&settings.allowed_reservations)},
                 {"constraints", optional_words(&settings.allowed_constraints)},
                 {"options", r.Words(&settings.allowed_options, "[--licenses]")}});
    };
    const StrictYaml::Take env = [&](const YAML::Node& value, const std::string& where) {
      r.Entries(value, where, kMaxEnv, [&](const std::string& key, const YAML::Node& one, const std::string& at) {
        std::string word;
        r.Text(&word)(one, at);
        (*settings.launch.mutable_env())[key] = word;
      });
    };
    const StrictYaml::Take signal_before = [&](const YAML::Node& value, const std::string& where) {
      absl::Duration time = absl::ZeroDuration();
      r.Time(&time)(value, where);
      if (time > absl::ZeroDuration()) slurm.mutable_signal_before()->set_seconds(absl::ToInt64Seconds(time));
    };
    r.Mapping(node, path,
              {{"name", r.Text(&out->name)},
               {"ssh", ssh},
               {"command", r.Words(&out->command, "[ssh, -T, host, itwin-agent, connect, --root, DIR]")},
               {"root", r.Text(&out->root)},
               {"scheduler", r.Text(&settings.scheduler)},
               {"agent", r.Text(&out->agent)},
               {"worker", worker},
               {"launcher", r.Text(settings.launch.mutable_launcher())},
               {"prologue", words_into(settings.launch.mutable_prologue())},
               {"modules", r.Words(&modules, "[OpenMPI/4.1.4]")},
               {"container", r.Text(settings.launch.mutable_container())},
               {"image", r.Text(&settings.image)},
               {"env", env},
               {"gpu_request", r.Text(slurm.mutable_gpu_request())},
               {"signal_before", signal_before},
               {"partitions", partitions},
               {"defaults", defaults},
               {"allow", allow},
               {"query_interval", r.Time(&out->query_interval)},
               {"max_waiting", r.Integer(&out->max_waiting)},
               {"spool_retention", r.Time(&out->spool_retention)}});
    settings.launch.set_worker(out->worker_path);
    for (const std::string& module : modules) settings.launch.add_prologue(absl::StrCat("module load ", module));
  };
}

absl::StatusOr<SiteFile> ParseSiteFile(absl::string_view text, absl::string_view file_name) {
  if (static_cast<int64_t>(text.size()) > kMaxFileBytes) return absl::InvalidArgumentError(absl::StrCat(file_name, ": is larger than 256 KiB"));
  SiteFile site;
  StrictYaml reader(file_name);
  ITWIN_RETURN_IF_ERROR(reader.Read(text, SiteKeys(&reader, &site)));
  for (const std::string& problem : SiteProblems(site, "")) reader.Problem("", problem);
  ITWIN_RETURN_IF_ERROR(reader.status());
  return site;
}

absl::StatusOr<SiteFile> ReadSiteFile(const std::string& path) {
  ITWIN_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
  return ParseSiteFile(text, path);
}

std::vector<std::string> SiteProblems(const SiteFile& site, const std::string& path) {
  std::vector<std::string> problems;
  const auto problem = [&](absl::string_view key, absl::string_view what) {
    problems.push_back(absl::StrCat(path.empty() ? "" : path + ".", key, ": ", what));
  };
  const auto range = [&](absl::string_view key, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) problem(key, absl::StrCat(value, " is out of range; use ", low, " to ", high));
  };
  if (!IsSiteName(site.name) || site.name == "any") {
    problem("name", absl::StrCat("'", site.name, "' must be 1 to 63 of a-z, 0-9, '-', '_' and '.', and not 'any'"));
  }
  const std::vector<std::string> schedulers = {"slurm", "process"};
  if (!site.settings.scheduler.empty() && std::find(schedulers.begin(), schedulers.end(), site.settings.scheduler) == schedulers.end()) {
    problem("scheduler", absl::StrCat("'", site.settings.scheduler, "' is unknown; ", UnknownNameHint(site.settings.scheduler, schedulers)));
  }
  if (site.ssh && !site.command.empty()) {
    problem("command", "stands beside `ssh`; a site is reached by one of them");
  } else if (site.ssh) {
    const SshSettings& ssh = *site.ssh;
    if (ssh.hosts.empty() || ssh.hosts.size() > kMaxHosts) problem("ssh.hosts", absl::StrCat("give 1 to ", kMaxHosts, " login nodes"));
    for (const std::string& host : ssh.hosts) {
      if (host.empty() || host.size() > 255 || host[0] == '-' || !All(host, ".-:_[]")) problem("ssh.hosts", absl::StrCat("'", host, "' is no host name or address"));
    }
    if (!ssh.user.empty() && (ssh.user[0] == '-' || !All(ssh.user, "._-@+"))) problem("ssh.user", absl::StrCat("'", ssh.user, "' is no account name"));
    range("ssh.port", ssh.port, 1, 65535);
    for (const std::string& fingerprint : ssh.fingerprints) {
      if (!absl::StartsWith(fingerprint, "SHA256:") || fingerprint.size() != 50 || !All(fingerprint.substr(7), "+/")) {
        problem("ssh.fingerprint", absl::StrCat("'", fingerprint, "' is no fingerprint; it reads SHA256: and 43 signs, as `ssh-keygen -lf` shows it"));
      }
    }
    if (ssh.key.empty() && !ssh.agent && ssh.one_time_code_program.empty()) problem("ssh.key", "missing; give the path of a private key, or `agent: true`");
    if (!ssh.certificate.empty() && ssh.key.empty()) problem("ssh.certificate", "needs `key`, the private key it was made for");
    for (const auto& [key, file] : {std::pair<const char*, const std::string&>{"ssh.key", ssh.key}, {"ssh.certificate", ssh.certificate},
                                    {"ssh.passphrase_file", ssh.passphrase_file}, {"ssh.known_hosts", ssh.known_hosts},
                                    {"ssh.one_time_code_program", ssh.one_time_code_program}}) {
      if (!file.empty() && file[0] != '/') problem(key, absl::StrCat("'", file, "' must be an absolute path of the gateway's machine, or begin with ~/"));
      if (absl::StrContains(file, "PRIVATE KEY")) problem(key, "holds a key; give the path of a file instead");
    }
    if (ssh.keepalive < absl::Seconds(1) || ssh.keepalive > absl::Minutes(10)) problem("ssh.keepalive", "use 1s to 10m");
    if (site.root.empty()) {
      problem("root", "missing; give a directory on a file system that login and compute nodes share, such as /scratch/$USER/itwin");
    }
    if (!site.worker_path.empty() && !site.worker_bundle.empty()) problem("worker", "has both `path` and `bundle`; give one of them");
    if (!site.worker_bundle.empty() && site.worker_bundle[0] != '/') problem("worker.bundle", "must be an absolute path of the gateway's machine, or begin with ~/");
  } else if (site.command.empty() || site.command[0].empty()) {
    problem("command", "missing; give `ssh`, or the command line that leads to `itwin-agent connect`");
  } else {
    if (!site.agent.empty()) problem("agent", "is part of `command` here; leave it out");
    if (!site.worker_bundle.empty()) problem("worker.bundle", "can be installed only over `ssh`; give worker.path");
  }
  for (const auto& [key, value] : {std::pair<const char*, const std::string&>{"root", site.root}, {"agent", site.agent}, {"worker.path", site.worker_path}}) {
    if (!value.empty() && !IsShellPath(value)) {
      problem(key, absl::StrCat("'", value, "' must be an absolute path, or begin with ~/ or $NAME, of letters, digits and / . _ - + = @ ,"));
    }
  }
  if (!site.worker_path.empty() && site.worker_path[0] != '/') problem("worker.path", "must be absolute: scripts name it");
  if (!site.worker_operators.empty() && site.worker_operators[0] != '/') problem("worker.operators", "must be an absolute path of the gateway's machine, or begin with ~/");
  range("max_waiting", site.max_waiting, 1, 100'000);
  for (const std::string& line : site.settings.launch.prologue()) {
    if (HasControl(line) || line.size() > 4096) problem("prologue", "each entry is one line of shell");
    if (absl::StartsWith(line, "module load ") && !All(line.substr(12), "._-+/:= ")) problem("modules", absl::StrCat("'", line.substr(12), "' is no name of a module"));
  }
  for (const auto& [key, value] : {std::pair<const char*, std::string>{"launcher", site.settings.launch.launcher()}, {"container", site.settings.launch.container()},
                                   {"gpu_request", site.settings.slurm.gpu_request()}}) {
    if (HasControl(value) || value.size() > 4096) problem(key, "must be one line");
  }
  const std::string& image = site.settings.image;
  if (!image.empty() && !IsImageName(image)) problem("image", absl::StrCat("'", image, "' is no name of a container image; ", kImageNameRule));
  if (!image.empty() && !absl::StrContains(site.settings.launch.container(), "{image}")) {
    problem("image", "has no place: `container` must say where it goes, such as: apptainer exec --nv {image}");
  }
  const std::string& gpu = site.settings.slurm.gpu_request();
  if (!gpu.empty() && (!absl::StartsWith(gpu, "--") || !absl::StrContains(gpu, "{gpus}"))) {
    problem("gpu_request", absl::StrCat("'", gpu, "' must be an option with {gpus} in it, such as --gres=gpu:{gpus} or --gres=gpu:{type}:{gpus}"));
  }
  for (const auto& [name, value] : site.settings.launch.env()) {
    if (name.empty() || absl::ascii_isdigit(static_cast<unsigned char>(name[0])) || !All(name, "_")) problem("env", absl::StrCat("'", name, "' is no name of a variable"));
  }
  for (const PartitionLimits& limits : site.settings.partitions) {
    if (limits.name.empty() || !All(limits.name, "_.-")) problem("partitions", absl::StrCat("'", limits.name, "' is no name of a partition"));
    for (const int value : {limits.max_nodes, limits.cpus_per_node, limits.gpus_per_node}) range(absl::StrCat("partitions.", limits.name), value, 0, 1'000'000);
    if (limits.max_time < absl::Minutes(1)) problem(absl::StrCat("partitions.", limits.name, ".max_time"), "use at least 1m");
  }
  for (const std::string& option : site.settings.allowed_options) {
    if (!absl::StartsWith(option, "--") || absl::StrContains(option, "=")) {
      problem("allow.options", absl::StrCat("'", option, "' must be an option's long name without a value, such as --licenses"));
    }
  }
  for (const std::string& option : site.settings.slurm.options()) {
    if (!absl::StartsWith(option, "--") || HasControl(option)) problem("defaults.options", absl::StrCat("'", option, "' must be an option's long form, such as --licenses=matlab:1"));
  }
  if (site.settings.scheduler == "process" && (!site.settings.partitions.empty() || !gpu.empty() || !site.settings.slurm.partition().empty())) {
    problem("scheduler", "is process, but the file speaks of partitions or GPUs; write scheduler: slurm");
  }
  return problems;
}

absl::Status CheckSecretFiles(const SiteFile& site) {
  if (!site.ssh) return absl::OkStatus();
  ITWIN_RETURN_IF_ERROR(CheckSecretFile("key", site.ssh->key));
  return CheckSecretFile("passphrase_file", site.ssh->passphrase_file);
}

absl::StatusOr<std::string> WithFingerprints(absl::string_view document, const std::vector<std::string>& fingerprints) {
  // yaml-cpp reports by exceptions; they end here.
  try {
    std::string text(document);
    const YAML::Node ssh = YAML::Load(text)["ssh"];
    if (!ssh || !ssh.IsMap() || ssh.size() == 0) return absl::InvalidArgumentError("the site file has no keys under `ssh`");
    if (ssh["fingerprint"]) {
      return absl::FailedPreconditionError(
          "the site file names other host keys under ssh.fingerprint; change it there, once you are sure of the new ones");
    }
    const bool flow = ssh.Style() == YAML::EmitterStyle::Flow;
    const size_t at = static_cast<size_t>(ssh.Mark().pos) + (flow ? 1 : 0);
    if (at > text.size()) return absl::InternalError("the place of `ssh` in the site file was not found");
    const std::string entry = absl::StrCat("fingerprint: [\"", absl::StrJoin(fingerprints, "\", \""), "\"]");
    text.insert(at, flow ? absl::StrCat(entry, ", ")
                         : absl::StrCat(entry, "\n", std::string(static_cast<size_t>(ssh.Mark().column), ' ')));
    ITWIN_ASSIGN_OR_RETURN(const SiteFile again, ParseSiteFile(text, "the site file"));
    if (!again.ssh || again.ssh->fingerprints != fingerprints) {
      return absl::InternalError("the fingerprint could not be put into the site file; write it under `ssh` yourself");
    }
    return text;
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(error.what());
  }
}

std::string ShellPath(absl::string_view path) {
  if (absl::StartsWith(path, "~/")) return absl::StrCat("\"$HOME/", path.substr(2), "\"");
  return absl::StrCat("\"", path, "\"");
}

std::string ConnectCommand(const SiteFile& site) {
  std::string line = absl::StrCat("exec ", ShellPath(site.agent.empty() ? site.root + "/releases/current/itwin-agent" : site.agent),
                                  " connect --root ", ShellPath(site.root));
  if (!site.settings.scheduler.empty()) absl::StrAppend(&line, " --scheduler ", site.settings.scheduler);
  if (!site.worker_path.empty()) absl::StrAppend(&line, " --worker ", ShellPath(site.worker_path));
  return line;
}

}  // namespace itwin::server

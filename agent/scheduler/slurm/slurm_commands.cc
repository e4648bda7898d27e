#include "agent/scheduler/slurm/slurm_commands.h"

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"

extern char** environ;

namespace itwin::agent {
namespace {

constexpr absl::Duration kRateWindow = absl::Minutes(5);
constexpr size_t kMaxOutput = 64 << 20;
constexpr const char* kUsualPlaces[] = {"/usr/bin", "/usr/local/bin", "/opt/slurm/bin", "/usr/local/slurm/bin",
                                        "/opt/slurm/current/bin", "/cm/shared/apps/slurm/current/bin", "/usr/slurm/bin"};

// What could change a command's output or options, and what belongs to our own session on the login node.
bool IsLeftOut(absl::string_view name) {
  if (name == "SLURM_CONF" || name == "SLURM_CONF_SERVER") return false;
  for (const char* prefix : {"SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SRUN_", "SALLOC_", "SPRIO_",
                             "PMI_", "PMIX_", "OMPI_COMM_", "SSH_", "XDG_SESSION", "ITWIN_LEASE"}) {
    if (absl::StartsWith(name, prefix)) return true;
  }
  for (const char* exact : {"LC_ALL", "DISPLAY", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "LS_COLORS", "TERM", "OLDPWD",
                            "PWD", "SHLVL", "_", "MAIL"}) {
    if (name == exact) return true;
  }
  return absl::StartsWith(name, "BASH_FUNC_");  // functions of a login shell: only trouble for a script
}

std::vector<std::pair<std::string, std::string>> CommandEnvironment() {
  std::vector<std::pair<std::string, std::string>> out;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const absl::string_view text(*entry);
    const size_t at = text.find('=');
    if (at == absl::string_view::npos || IsLeftOut(text.substr(0, at))) continue;
    out.emplace_back(std::string(text.substr(0, at)), std::string(text.substr(at + 1)));
  }
  if (const char* locale = getenv("LC_ALL"); locale != nullptr) out.emplace_back("ITWIN_SAVED_LC_ALL", locale);
  out.emplace_back("LC_ALL", "C");
  out.emplace_back("SLURM_TIME_FORMAT", "%s");
  return out;
}

}  // namespace

absl::StatusOr<SlurmCommands::Programs> SlurmCommands::Find(const std::string& path) {
  std::vector<std::string> places = absl::StrSplit(path, ':', absl::SkipEmpty());
  places.insert(places.end(), std::begin(kUsualPlaces), std::end(kUsualPlaces));
  const auto find = [&](const char* name) -> std::string {
    for (const std::string& place : places) {
      if (place[0] != '/') continue;
      std::string candidate = absl::StrCat(place, "/", name);
      if (access(candidate.c_str(), X_OK) == 0) return candidate;
    }
    return "";
  };
  Programs out{.sbatch = find("sbatch"), .squeue = find("squeue"), .scancel = find("scancel"), .scontrol = find("scontrol"),
               .sinfo = find("sinfo"), .sacct = find("sacct"), .srun = find("srun")};
  std::vector<std::string> missing;
  const std::pair<const char*, const std::string*> needed[] = {
      {"sbatch", &out.sbatch}, {"squeue", &out.squeue}, {"scancel", &out.scancel}, {"scontrol", &out.scontrol}};
  for (const auto& [name, found] : needed) {
    if (found->empty()) missing.push_back(name);
  }
  if (!missing.empty()) {
    return absl::NotFoundError(absl::StrCat("this host has no ", absl::StrJoin(missing, ", "), "; looked in ",
                                            absl::StrJoin(places, ", "), ". Put SLURM's directory into PATH"));
  }
  return out;
}

absl::StatusOr<CommandOutput> SlurmCommands::Run(const std::string& program, std::vector<std::string> arguments,
                                                 absl::Duration limit) {
  if (program.empty()) return absl::NotFoundError("this host lacks that command of SLURM");
  {
    absl::MutexLock lock(&mu_);
    const absl::Time now = absl::Now();
    ++calls_;
    first_ = std::min(first_, now);
    recent_.push_back(now);
    while (!recent_.empty() && recent_.front() < now - kRateWindow) recent_.pop_front();
  }
  SubprocessOptions options;
  options.argv.push_back(program);
  for (std::string& argument : arguments) options.argv.push_back(std::move(argument));
  options.directory = "/";
  options.env = CommandEnvironment();
  options.clear_env = true;
  return RunCommand(std::move(options), limit, kMaxOutput);
}

int64_t SlurmCommands::calls() const {
  absl::MutexLock lock(&mu_);
  return calls_;
}

double SlurmCommands::calls_per_minute() const {
  absl::MutexLock lock(&mu_);
  const absl::Time now = absl::Now();
  while (!recent_.empty() && recent_.front() < now - kRateWindow) recent_.pop_front();
  const absl::Duration window = std::clamp(now - first_, absl::Minutes(1), kRateWindow);
  return static_cast<double>(recent_.size()) / absl::ToDoubleMinutes(window);
}

std::string WordsOf(const CommandOutput& output) {
  std::vector<std::string> lines;
  for (absl::string_view line : absl::StrSplit(absl::StrCat(output.err, "\n", output.out), '\n')) {
    line = absl::StripAsciiWhitespace(line);
    for (const char* prefix : {"sbatch: error: ", "sbatch: ", "squeue: error: ", "scancel: error: ", "slurm_load_jobs error: "}) {
      absl::ConsumePrefix(&line, prefix);
    }
    if (!line.empty() && lines.size() < 20) lines.emplace_back(line.substr(0, 500));
  }
  return lines.empty() ? absl::StrCat("exit code ", output.exit.exit_code) : absl::StrJoin(lines, "; ");
}

}  // namespace itwin::agent

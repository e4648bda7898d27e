#include "agent/scheduler/slurm/batch_script.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "agent/scheduler/launch.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

// Options of ours, by which attempts are found again; a site's own options may not change them.
constexpr absl::string_view kOurOptions[] = {
    "--job-name", "-J", "--comment", "--requeue", "--no-requeue", "--output", "-o", "--error", "-e", "--chdir", "-D", "--array",
    "-a", "--parsable", "--wrap", "--wait", "-W", "--export", "--export-file", "--test-only", "--dependency", "-d", "--hold", "-H"};

absl::Status CheckValue(absl::string_view name, absl::string_view value) {
  for (const char c : value) {
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) {
      return absl::InvalidArgumentError(absl::StrCat("the SLURM setting '", name, "' holds a line break or control character"));
    }
  }
  if (value.size() > 4096) return absl::InvalidArgumentError(absl::StrCat("the SLURM setting '", name, "' is too long"));
  return absl::OkStatus();
}

absl::Status CheckWord(absl::string_view name, absl::string_view value) {
  ITWIN_RETURN_IF_ERROR(CheckValue(name, value));
  if (absl::StartsWith(value, "-") || value.find_first_of(" \t'\"\\`$;<>") != absl::string_view::npos) {
    return absl::InvalidArgumentError(absl::StrCat("'", value, "' cannot be the SLURM setting '", name, "'"));
  }
  return absl::OkStatus();
}

int64_t MinutesOf(absl::Duration time) {
  if (time == absl::InfiniteDuration()) return 0;
  return std::max<int64_t>(1, absl::ToInt64Minutes(absl::Ceil(time, absl::Minutes(1))));
}

}  // namespace

absl::Duration GrantedTime(const Submission& submission) { return absl::Minutes(MinutesOf(submission.time)); }

absl::StatusOr<std::vector<std::string>> SbatchOptions(const Submission& submission, const std::string& name) {
  const v1::SlurmSettings& slurm = submission.slurm;
  std::vector<std::string> out = {
      "--parsable", "--no-requeue", "--export=ALL", absl::StrCat("--job-name=", name), absl::StrCat("--comment=", name),
      absl::StrCat("--nodes=", std::max(1, submission.nodes)),
      absl::StrCat("--ntasks-per-node=", std::max(1, submission.ranks_per_node))};
  // '%' begins a pattern of sbatch's; a path that has one anywhere but doubled would be changed.
  const auto path = [](const std::string& text) { return absl::StrReplaceAll(text, {{"%", "%%"}}); };
  out.push_back(absl::StrCat("--output=", path(submission.directory.script_log_path())));
  out.push_back("--open-mode=append");
  out.push_back(absl::StrCat("--chdir=", submission.directory.path()));
  if (submission.cpus_per_rank > 0) out.push_back(absl::StrCat("--cpus-per-task=", submission.cpus_per_rank));
  if (submission.memory_mib_per_node > 0) out.push_back(absl::StrCat("--mem=", submission.memory_mib_per_node, "M"));
  if (const int64_t minutes = MinutesOf(submission.time); minutes > 0) out.push_back(absl::StrCat("--time=", minutes));
  if (submission.gpus_per_node > 0) {
    std::string request = slurm.gpu_request();
    if (request.empty()) request = slurm.gpu_type().empty() ? "--gpus-per-node={gpus}" : "--gpus-per-node={type}:{gpus}";
    ITWIN_RETURN_IF_ERROR(CheckWord("gpu_type", slurm.gpu_type()));
    ITWIN_RETURN_IF_ERROR(CheckValue("gpu_request", request));
    request = absl::StrReplaceAll(request, {{"{gpus}", absl::StrCat(submission.gpus_per_node)},
                                            {"{gpus_total}", absl::StrCat(submission.gpus_per_node * std::max(1, submission.nodes))},
                                            {"{type}", slurm.gpu_type()}});
    ITWIN_ASSIGN_OR_RETURN(const std::vector<std::string> words, SplitCommandLine(request));
    for (const std::string& word : words) {
      if (!absl::StartsWith(word, "-")) {
        return absl::InvalidArgumentError(absl::StrCat("the site's gpu_request '", slurm.gpu_request(),
                                                       "' has a word that is no option: ", word));
      }
      out.push_back(word);
    }
  }
  const std::pair<absl::string_view, const std::string&> words[] = {
      {"partition", slurm.partition()}, {"account", slurm.account()},         {"qos", slurm.qos()},
      {"reservation", slurm.reservation()}, {"constraint", slurm.constraint()}};
  for (const auto& [setting, value] : words) {
    if (value.empty()) continue;
    ITWIN_RETURN_IF_ERROR(CheckWord(setting, value));
    out.push_back(absl::StrCat("--", setting, "=", value));
  }
  if (slurm.exclusive()) out.push_back("--exclusive");
  if (slurm.exclude_nodes_size() > 0) {
    for (const std::string& node : slurm.exclude_nodes()) ITWIN_RETURN_IF_ERROR(CheckWord("exclude_nodes", node));
    out.push_back(absl::StrCat("--exclude=", absl::StrJoin(slurm.exclude_nodes(), ",")));
  }
  // To the script alone, which is the supervisor: it makes the stop file, and no process dies of a signal it does not know.
  if (slurm.signal_before().seconds() > 0) {
    out.push_back(absl::StrCat("--signal=B:USR2@", std::min<int64_t>(slurm.signal_before().seconds(), 65'535)));
  }
  for (const std::string& option : slurm.options()) {
    ITWIN_RETURN_IF_ERROR(CheckValue("options", option));
    const absl::string_view flag = absl::string_view(option).substr(0, option.find('='));
    if (!absl::StartsWith(option, "-")) {
      return absl::InvalidArgumentError(absl::StrCat("'", option, "' in the SLURM options of the site is no option"));
    }
    if (std::find(std::begin(kOurOptions), std::end(kOurOptions), flag) != std::end(kOurOptions) ||
        (flag.size() > 2 && flag[1] != '-' &&
         std::find(std::begin(kOurOptions), std::end(kOurOptions), flag.substr(0, 2)) != std::end(kOurOptions))) {
      return absl::InvalidArgumentError(
          absl::StrCat("the SLURM option '", option, "' cannot be set for a site: attempts are found again by what it changes"));
    }
    out.push_back(option);
  }
  return out;
}

std::string ShapeOf(const std::vector<std::string>& options) {
  std::vector<absl::string_view> out;
  for (const std::string& option : options) {
    bool own = false;
    for (const char* name : {"--parsable", "--job-name=", "--comment=", "--output=", "--chdir="}) {
      own |= absl::StartsWith(option, name);
    }
    if (!own) out.push_back(option);
  }
  return absl::StrJoin(out, "\n");
}

std::string RenderBatchScript(const Submission& submission, const BatchSite& site) {
  std::string out = absl::StrCat(
      "#!/bin/bash\n"
      "# Attempt ", submission.directory.key().text(), " of itwin. script.sh takes the attempt's lease, runs the program and records how it\n"
      "# ended; a second life of this job (after a requeue) finds the lease taken and leaves.\n"
      // What the agent set for SLURM's commands is not for the program.
      "unset LC_ALL SLURM_TIME_FORMAT\n"
      "[ -z \"${ITWIN_SAVED_LC_ALL+x}\" ] || export LC_ALL=\"$ITWIN_SAVED_LC_ALL\"\n"
      "unset ITWIN_SAVED_LC_ALL\n");
  if (submission.cpus_per_rank > 0) {
    // From 22.05 on srun does not take this over by itself.
    absl::StrAppend(&out, "export SRUN_CPUS_PER_TASK=", submission.cpus_per_rank, "\n");
  }
  // mpirun starts one daemon for each node as a step: since 20.11 a step gets only what it asks for, so it asks for all.
  if (site.version == 0 || site.version >= 201100) {
    for (const char* launcher : {"OMPI", "PRTE"}) {  // of Open MPI 4, of 5
      absl::StrAppend(&out, "export ", launcher, "_MCA_plm_slurm_args=\"${", launcher, "_MCA_plm_slurm_args:---whole}\"\n");
    }
  }
  // A limit on tasks that the request implies would otherwise also bind a launcher that asks for less.
  absl::StrAppend(&out, "unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_DISTRIBUTION\n");
  absl::StrAppend(&out, "export ITWIN_KILL_WAIT=", absl::ToInt64Seconds(site.kill_wait), "\n");
  if (const absl::Duration time = GrantedTime(submission); time > absl::ZeroDuration()) {
    absl::StrAppend(&out, "export ITWIN_GRANTED_SECONDS=", absl::ToInt64Seconds(time), "\n");
  }
  absl::StrAppend(&out, "exec ", ShellQuote(submission.directory.script_path()), "\n");
  return out;
}

}  // namespace itwin::agent

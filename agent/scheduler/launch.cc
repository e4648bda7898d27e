#include "agent/scheduler/launch.h"

#include <errno.h>
#include <sched.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "common/files.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

// Ranks copy from each other's memory where the kernel lets them; in some containers it does not, and Open MPI's
// shared memory transport then fails instead of falling back.
bool CrossMemoryAttachWorks() {
  char from = 1, to = 0;
  iovec local{&to, 1}, remote{&from, 1};
  return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == 1;
}

int CpusHere() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

bool IsExecutableFile(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) && access(path.c_str(), X_OK) == 0;
}

}  // namespace

absl::StatusOr<std::vector<std::string>> SplitCommandLine(const std::string& text) {
  std::vector<std::string> out;
  std::string word;
  bool in_word = false;
  char quote = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\\' && quote != '\'' && i + 1 < text.size()) {
      word += text[++i];
      in_word = true;
    } else if (quote != 0) {
      if (c == quote) {
        quote = 0;
      } else {
        word += c;
      }
    } else if (c == '\'' || c == '"') {
      quote = c;
      in_word = true;
    } else if (c == ' ' || c == '\t' || c == '\n') {
      if (in_word) out.push_back(word);
      word.clear();
      in_word = false;
    } else {
      word += c;
      in_word = true;
    }
  }
  if (quote != 0) return absl::InvalidArgumentError(absl::StrCat("a quote is not closed in: ", text));
  if (in_word) out.push_back(word);
  return out;
}

std::string ShellQuote(const std::string& text) {
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

std::string RenderScript(const AttemptDirectory& directory, const std::string& agent_program,
                         const LaunchOptions& options) {
  return absl::StrCat("#!/bin/sh\n# Attempt ", directory.key().text(),
                      ". The program below takes the lease, runs the job and records how it ended.\nexec ",
                      ShellQuote(agent_program), " run-attempt --worker ", ShellQuote(options.worker), " --launcher ",
                      ShellQuote(options.launcher), " --grace ", ShellQuote(absl::FormatDuration(options.grace)), " ",
                      ShellQuote(directory.path()), "\n");
}

std::string WorkerOf(const v1::StartAttemptRequest& request, const LaunchOptions& options) {
  return request.launch().worker().empty() ? options.worker : request.launch().worker();
}

absl::StatusOr<std::vector<std::string>> LaunchCommand(const AttemptDirectory& directory,
                                                       const v1::StartAttemptRequest& request,
                                                       const LaunchOptions& options) {
  std::vector<std::string> program(request.argv().begin(), request.argv().end());
  if (request.train()) {
    const std::string worker = WorkerOf(request, options);
    if (worker.empty()) {
      return absl::InvalidArgumentError(
          "this site has no itwin-worker, so it cannot train; install it beside itwin-agent or name it with --worker");
    }
    program = {worker, "--spec", directory.spec_path(), "--spool", directory.path()};
  }
  if (program.empty() || program[0].empty()) {
    return absl::InvalidArgumentError("the command is empty; it needs at least the name of a program");
  }
  ITWIN_ASSIGN_OR_RETURN(std::vector<std::string> command, SplitCommandLine(request.launch().container()));
  command.insert(command.end(), program.begin(), program.end());
  if (request.train() || request.mpi()) {
    const int nodes = std::max(1, request.nodes()), per_node = std::max(1, request.ranks_per_node());
    ITWIN_ASSIGN_OR_RETURN(
        std::vector<std::string> launcher,
        SplitCommandLine(request.launch().launcher().empty() ? options.launcher : request.launch().launcher()));
    if (launcher.empty()) return absl::InvalidArgumentError("the launcher line of this site is empty");
    for (std::string& word : launcher) {
      word = absl::StrReplaceAll(word, {{"{ranks}", absl::StrCat(nodes * per_node)},
                                        {"{nodes}", absl::StrCat(nodes)},
                                        {"{ranks_per_node}", absl::StrCat(per_node)},
                                        {"{gpus_per_node}", absl::StrCat(request.gpus_per_node())},
                                        {"{cpus_per_rank}", absl::StrCat(std::max(1, request.cpus_per_rank()))}});
    }
    command.insert(command.begin(), launcher.begin(), launcher.end());
  }
  if (request.launch().prologue_size() == 0) return command;
  // The lines are the site's and may be any shell; what is run behind them are arguments, never text of the script.
  std::string script = "trap 'itwin_code=$?; echo \"itwin: the prologue of this site failed (exit code $itwin_code) at: "
                       "$BASH_COMMAND\" >&2; exit 1' ERR\n";
  for (const std::string& line : request.launch().prologue()) absl::StrAppend(&script, line, "\n");
  absl::StrAppend(&script, "trap - ERR\nexec \"$@\"\n");
  command.insert(command.begin(), {"/bin/bash", "-c", script, "itwin-prologue"});
  return command;
}

namespace {

constexpr int kMaxResumeDirectories = 8;

// The checkpoints that the request names; for the worker also those of the attempts before that one, newest first,
// separated by ':', in case they do not verify. Other programs know of one directory.
std::string ResumeDirectories(const AttemptDirectory& directory, const v1::StartAttemptRequest& request) {
  const absl::StatusOr<AttemptKey> from = AttemptKey::Parse(request.resume_attempt());
  if (!from.ok()) return "";
  std::vector<std::string> paths = {AttemptDirectory(directory.root(), *from).checkpoints_path()};
  if (!request.train() || absl::StrContains(directory.root(), ':')) return paths.front();
  for (int number = from->number() - 1; number > 0 && paths.size() < kMaxResumeDirectories; --number) {
    const AttemptDirectory older(directory.root(), AttemptKey(from->job(), number));
    if (older.HasCheckpoint()) paths.push_back(older.checkpoints_path());
  }
  return absl::StrJoin(paths, ":");
}

}  // namespace

std::map<std::string, std::string> LaunchEnvironment(const AttemptDirectory& directory,
                                                     const v1::StartAttemptRequest& request,
                                                     const std::string& lease_nonce, absl::Time deadline) {
  std::map<std::string, std::string> env;
  // A rank's share of the cores; without it every rank of a numerical library takes all of them.
  const int ranks = request.train() || request.mpi() ? std::max(1, request.ranks_per_node()) : 1;
  // What a scheduler gave us of this node, where it says so; a process may be free to use more.
  int cpus = CpusHere(), given = 0;
  if (const char* text = getenv("SLURM_CPUS_ON_NODE"); text != nullptr && absl::SimpleAtoi(text, &given) && given > 0) {
    cpus = std::min(cpus, given);
  }
  const int threads = request.cpus_per_rank() > 0 ? request.cpus_per_rank() : std::max(1, cpus / ranks);
  env["OMP_NUM_THREADS"] = absl::StrCat(threads);
  if (request.train() || request.mpi()) {
    for (const char* launcher : {"OMPI", "PRTE"}) {  // of Open MPI 4, of 5
      env[absl::StrCat(launcher, "_ALLOW_RUN_AS_ROOT")] = "1";
      env[absl::StrCat(launcher, "_ALLOW_RUN_AS_ROOT_CONFIRM")] = "1";
    }
    // No core left over: a rank that waits should let another work (2 ranks on 2 busy cores: a third less time for
    // large messages, a fifth more for the smallest).
    if (ranks >= CpusHere()) env["OMPI_MCA_mpi_yield_when_idle"] = "1";
    if (!CrossMemoryAttachWorks()) {
      for (const char* name : {"vader", "sm"})  // in Open MPI 4, in 5
        env[absl::StrCat("OMPI_MCA_btl_", name, "_single_copy_mechanism")] = "none";
    }
  }
  for (const auto& [name, value] : request.launch().env()) env[name] = value;
  for (const auto& [name, value] : request.env()) env[name] = value;
  env["ITWIN_SPEC"] = directory.spec_path();
  env["ITWIN_METRICS"] = directory.metrics_path();
  env["ITWIN_OUTPUTS"] = directory.outputs_path();
  env["ITWIN_CHECKPOINTS"] = directory.checkpoints_path();
  env["ITWIN_STOP"] = directory.stop_path();
  env["ITWIN_RESULT"] = directory.result_path();
  env["ITWIN_ATTEMPT"] = directory.key().text();
  env["ITWIN_LEASE"] = lease_nonce;
  env["ITWIN_DEADLINE"] = deadline == absl::InfiniteFuture() ? "" : absl::StrCat(absl::ToUnixSeconds(deadline));
  env["ITWIN_RESUME"] = ResumeDirectories(directory, request);
  return env;
}

absl::Status CheckProgram(const std::string& program, const std::string& directory, const std::string& path) {
  if (absl::StrContains(program, '/')) {
    const std::string full = program[0] == '/' ? program : absl::StrCat(directory, "/", program);
    if (IsExecutableFile(full)) return absl::OkStatus();
    if (!FileExists(full)) {
      return absl::NotFoundError(absl::StrCat(
          "program '", program, "' was not found",
          program[0] == '/' ? " on the machine the job runs on"
                            : " in the job's working directory; send it as an input with this path"));
    }
    return absl::PermissionDeniedError(
        absl::StrCat("program '", program, "' may not be executed; mark the input as executable, or run it by its "
                     "interpreter, for example: python3 ", program));
  }
  for (absl::string_view part : absl::StrSplit(path, ':')) {
    if (IsExecutableFile(absl::StrCat(part.empty() ? "." : part, "/", program))) return absl::OkStatus();
  }
  return absl::NotFoundError(absl::StrCat("program '", program, "' was not found in PATH (", path,
                                          "); write ./", program, " for a file of the working directory"));
}

}  // namespace itwin::agent

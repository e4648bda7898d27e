// What `itwin site doctor` wants to know of a SLURM site.
#include <poll.h>
#include <unistd.h>

#include <algorithm>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "agent/scheduler/slurm/slurm_scheduler.h"
#include "agent/spool/spool_files.h"
#include "common/ids.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

constexpr absl::Duration kJobLimit = absl::Minutes(2);
constexpr absl::Duration kSkewWorthAWord = absl::Seconds(2);

v1::CheckResult Result(const char* name, v1::CheckVerdict verdict, std::string found, std::string advice = "") {
  v1::CheckResult out;
  out.set_name(name);
  out.set_verdict(verdict);
  out.set_found(std::move(found));
  out.set_advice(std::move(advice));
  return out;
}

v1::CheckResult CheckVersion(const SlurmScheduler::Facts& facts) {
  const std::string found = absl::StrCat("SLURM ", facts.facts.version(), ", cluster ", facts.facts.cluster());
  const bool gpus = std::any_of(facts.facts.partitions().begin(), facts.facts.partitions().end(),
                                [](const v1::Partition& p) { return p.gpus_per_node() > 0; });
  if (facts.site.version == 0) {
    return Result("scheduler", v1::CHECK_VERDICT_WARNING, "SLURM answers, but its version cannot be read",
                  "tell the authors what `sinfo -V` prints here");
  }
  if (facts.site.version < 200200) {
    return Result("scheduler", v1::CHECK_VERDICT_ERROR, found, "SLURM 20.02 or newer is needed (squeue --me)");
  }
  if (gpus && facts.site.version >= 220505 && facts.site.version <= 220508) {
    return Result("scheduler", v1::CHECK_VERDICT_WARNING, found,
                  "in 22.05.5 to 22.05.8 requests for GPUs may fail (SLURM bug 15857); if they do, set gpu_request to "
                  "--gres=gpu:{gpus} in the site file, or have SLURM updated");
  }
  return Result("scheduler", v1::CHECK_VERDICT_OK, found);
}

std::vector<v1::CheckResult> CheckPartitions(const v1::SlurmFacts& facts, const v1::SlurmSettings& wanted) {
  std::vector<std::string> words;
  const v1::Partition* used = nullptr;
  for (const v1::Partition& partition : facts.partitions()) {
    std::string limit = "no time limit";
    if (partition.has_max_time()) limit = absl::StrCat("at most ", absl::FormatDuration(absl::Seconds(partition.max_time().seconds())));
    words.push_back(absl::StrCat(partition.name(), partition.is_default() ? " (default)" : "", partition.up() ? "" : " (down)", ": ",
                                 partition.nodes(), " nodes, ", partition.cpus_per_node(), " CPUs, ", partition.memory_mib_per_node(),
                                 " MiB, ", partition.gpus_per_node(), " GPUs each, ", limit));
    if (wanted.partition().empty() ? partition.is_default() : partition.name() == wanted.partition()) used = &partition;
  }
  const std::string found = absl::StrJoin(words, "; ");
  if (words.empty()) {
    return {Result("partitions", v1::CHECK_VERDICT_ERROR, "no partition can be seen", "ask the site which one you may use")};
  }
  if (used == nullptr) {
    return {Result("partitions", v1::CHECK_VERDICT_ERROR, found,
                   wanted.partition().empty() ? "there is no default partition: name one in the site file"
                                              : absl::StrCat("there is no partition '", wanted.partition(), "': correct the site file"))};
  }
  if (!used->up()) {
    return {Result("partitions", v1::CHECK_VERDICT_WARNING, found, absl::StrCat("partition ", used->name(), " is down now; jobs will wait"))};
  }
  return {Result("partitions", v1::CHECK_VERDICT_OK, found)};
}

v1::CheckResult CheckMpi(const v1::SlurmFacts& facts, const std::string& launcher) {
  const std::string found =
      absl::StrCat("launcher: ", launcher, "; srun offers ", facts.mpi_plugins_size() == 0 ? "nothing" : absl::StrJoin(facts.mpi_plugins(), ", "));
  const size_t at = launcher.find("--mpi=");
  if (at == std::string::npos) return Result("mpi", v1::CHECK_VERDICT_OK, found);
  const std::string plugin = launcher.substr(at + 6, launcher.find(' ', at) - at - 6);
  const auto& plugins = facts.mpi_plugins();
  if (std::find(plugins.begin(), plugins.end(), plugin) == plugins.end()) {
    return Result("mpi", v1::CHECK_VERDICT_ERROR, found,
                  absl::StrCat("srun has no MPI plug-in '", plugin, "'; set launcher in the site file to one it has, or to mpirun -n {ranks}"));
  }
  return Result("mpi", v1::CHECK_VERDICT_OK, found);
}

}  // namespace

void SlurmScheduler::Diagnose(const v1::DiagnoseRequest& request, const std::function<bool(const v1::CheckResult&)>& emit) {
  if (const absl::Status up = CheckController(); !up.ok()) {
    emit(Result("scheduler", v1::CHECK_VERDICT_ERROR, std::string(up.message()),
                "wait until SLURM's controller is back; if others can submit from this host, check SLURM_CONF and munge"));
    return;
  }
  const absl::StatusOr<std::shared_ptr<const Facts>> facts = ReadFacts();
  if (!facts.ok()) {
    emit(Result("scheduler", v1::CHECK_VERDICT_ERROR, std::string(facts.status().message()), "run `scontrol show config` by hand here"));
    return;
  }
  const v1::SlurmFacts& slurm = (*facts)->facts;
  if (!emit(CheckVersion(**facts))) return;
  for (const v1::CheckResult& result : CheckPartitions(slurm, request.slurm())) {
    if (!emit(result)) return;
  }
  const int64_t age = slurm.min_job_age().seconds();
  const std::string forgotten = age == 0 ? "finished jobs stay in the queue" : absl::StrCat("finished jobs leave the queue after ", age, " s");
  if (!emit(slurm.accounting()
                ? Result("accounting", v1::CHECK_VERDICT_OK, absl::StrCat("on; ", forgotten))
                : Result("accounting", age != 0 && age < 60 ? v1::CHECK_VERDICT_WARNING : v1::CHECK_VERDICT_OK,
                         absl::StrCat("off; ", forgotten),
                         age != 0 && age < 60 ? "after an outage of this agent the reason of a job's end may be lost; the result is not" : ""))) {
    return;
  }
  std::string launcher = request.launch().launcher();
  if (launcher.empty() && options_.launch.launcher != LaunchOptions().launcher) launcher = options_.launch.launcher;
  if (launcher.empty()) launcher = DefaultLauncher().value_or("");
  const v1::CheckResult mpi = CheckMpi(slurm, launcher);
  if (!emit(mpi)) return;
  if (!emit(Result("calls", v1::CHECK_VERDICT_OK,
                   absl::StrFormat("%d calls of SLURM's commands since this agent began, %.1f per minute lately; one squeue for all jobs "
                                   "every 2 s after a change to every %s when calm; %d rows could not be read, %d states were not known",
                                   commands_.calls(), commands_.calls_per_minute(), absl::FormatDuration(Describe().longest_interval),
                                   bad_rows(), unrecognized_states())))) {
    return;
  }
  if (!request.run_jobs()) {
    emit(Result("worker", v1::CHECK_VERDICT_SKIPPED, "no job was run to try it"));
    return;
  }
  std::optional<v1::CheckResult> clock;
  v1::DiagnoseRequest filled = request;
  filled.mutable_launch()->set_launcher(launcher);
  if (!emit(TryWorker(filled, **facts, &clock))) return;
  if (clock) emit(*clock);
}

// A real job on two nodes (one, where there are no two), through the queue, with a bounded wait; cancelled after.
v1::CheckResult SlurmScheduler::TryWorker(const v1::DiagnoseRequest& request, const Facts& facts, std::optional<v1::CheckResult>* clock) {
  const auto failed = [](std::string found, std::string advice) {
    return Result("worker", v1::CHECK_VERDICT_ERROR, std::move(found), std::move(advice));
  };
  const absl::Duration limit =
      request.job_limit().seconds() > 0 ? absl::Seconds(request.job_limit().seconds()) : kJobLimit;
  Submission submission{.directory = AttemptDirectory(options_.root + "/doctor", AttemptKey(JobId::Random(), 1))};
  submission.slurm = request.slurm();
  submission.time = absl::Minutes(5);
  submission.nodes = 1;
  for (const v1::Partition& partition : facts.facts.partitions()) {
    if (request.slurm().partition().empty() ? !partition.is_default() : partition.name() != request.slurm().partition()) continue;
    if (partition.nodes() >= 2 && partition.max_nodes_per_job() != 1) submission.nodes = 2;
    if (partition.has_max_time()) submission.time = std::min(submission.time, absl::Seconds(partition.max_time().seconds()));
  }
  const std::string directory = submission.directory.path();
  absl::Cleanup remove = [&] {
    RemoveTree(submission.directory.job_path()).IgnoreError();
  };
  if (const absl::Status made = MakeDirectories(directory); !made.ok()) return failed(std::string(made.message()), "");

  v1::StartAttemptRequest start;
  start.set_nodes(submission.nodes);
  start.set_ranks_per_node(1);
  start.set_mpi(true);
  *start.mutable_launch() = request.launch();
  const std::string worker = WorkerOf(start, options_.launch);
  if (worker.empty()) return failed("no itwin-worker is installed", "install it, or set worker in the site file; command jobs run without");
  start.add_argv(worker);
  start.add_argv("--self-test");
  const absl::StatusOr<std::vector<std::string>> command = LaunchCommand(submission.directory, start, options_.launch);
  if (!command.ok()) return failed(std::string(command.status().message()), "correct the launcher in the site file");
  const std::string name = absl::StrCat("itwin-doctor-", RandomHex(6));
  const absl::StatusOr<std::vector<std::string>> options = SbatchOptions(submission, name);
  if (!options.ok()) return failed(std::string(options.status().message()), "correct the site file");
  std::string script = RenderBatchScript(submission, facts.site);
  // In place of script.sh.
  script = absl::StrCat(script.substr(0, script.rfind("exec ")), "printf '%s %s\\n' \"$(date +%s.%N)\" \"$(hostname)\" > ",
                        ShellQuote(directory + "/started"), "\nexec > ", ShellQuote(directory + "/out"),
                        " 2>&1\nexport OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1\nexec");
  for (const std::string& word : *command) absl::StrAppend(&script, " ", ShellQuote(word));
  script += "\n";
  const std::string path = directory + "/batch.sh";
  if (const absl::Status written = WriteFileAtomically(path, script, 0700); !written.ok()) return failed(std::string(written.message()), "");

  std::vector<std::string> arguments = *options;
  arguments.push_back(path);
  const absl::Time before = absl::Now();
  const absl::StatusOr<CommandOutput> output = commands_.Run(commands_.programs().sbatch, std::move(arguments), limit);
  if (!output.ok()) return failed(std::string(output.status().message()), "try sbatch by hand");
  const std::optional<SubmittedId> id = ParseSubmitted(output->out);
  if (output->exit.exit_code != 0 || !id) {
    return failed(absl::StrCat("sbatch: ", WordsOf(*output)), "correct partition, account or QOS in the site file");
  }
  absl::Cleanup cancel = [&] {
    (void)commands_.Run(commands_.programs().scancel, {absl::StrCat("--name=", name), id->id}, absl::Seconds(30));
  };
  const absl::Time deadline = before + limit;
  std::string waits = "it waits";
  bool seen = false, over = false;
  std::string end;
  while (!over && absl::Now() < deadline) {
    poll(nullptr, 0, static_cast<int>(absl::ToInt64Milliseconds(options_.rules.between)));
    absl::Time now{};
    timespec steady{};
    clock_gettime(CLOCK_BOOTTIME, &steady);
    now = absl::TimeFromTimespec(steady);
    const absl::StatusOr<LookPointer> look = LookBegunAfter(now);
    if (!look.ok()) continue;
    const auto rows = (*look)->by_name.find(name);
    if (rows == (*look)->by_name.end()) {
      over = seen;
      continue;
    }
    seen = true;
    const SlurmJobRow& row = rows->second.front();
    if (row.state == SlurmState::kPending) waits = ExplainPending(row.reason).words;
    over = IsTerminal(row.state);
    if (over) end = DescribeEnd(row.word, row.reason, row.exit);
    if (over && row.state == SlurmState::kCompleted) end.clear();
  }
  const absl::Time after = absl::Now();
  std::string text = ReadFile(directory + "/out", 1 << 16).value_or("");
  absl::StripAsciiWhitespace(&text);
  const std::vector<std::string> first = absl::StrSplit(ReadFile(directory + "/started", 256).value_or(""), ' ');
  double started = 0;
  if (first.size() == 2 && absl::SimpleAtod(first[0], &started)) {
    const absl::Time there = absl::FromUnixMicros(static_cast<int64_t>(started * 1e6));
    const absl::Duration skew = there < before ? there - before : there > after ? there - after : absl::ZeroDuration();
    const std::string host(absl::StripAsciiWhitespace(first[1]));
    *clock = absl::AbsDuration(skew) < kSkewWorthAWord
                 ? Result("clock", v1::CHECK_VERDICT_OK, absl::StrCat("the clocks of this host and of ", host, " agree"))
                 : Result("clock", v1::CHECK_VERDICT_WARNING,
                          absl::StrCat("the clock of ", host, " is at least ", absl::FormatDuration(absl::AbsDuration(skew)),
                                       skew > absl::ZeroDuration() ? " ahead of" : " behind", " this host's"),
                          "times shown for jobs will be off; ask the site to have its clocks set");
  }
  if (!over) {
    return Result("worker", v1::CHECK_VERDICT_WARNING,
                  absl::StrCat("the test job did not end within ", absl::FormatDuration(limit), ": ", text.empty() ? waits : text),
                  "the queue may be full; run the check again later, or with more time");
  }
  const bool good = end.empty() && absl::StrContains(text, absl::StrCat("ranks ", submission.nodes));
  if (good && absl::StrContains(text, "warning")) return Result("worker", v1::CHECK_VERDICT_WARNING, text, "see the words of the worker");
  if (good) return Result("worker", v1::CHECK_VERDICT_OK, text);
  return failed(absl::StrCat(end.empty() ? "the worker's self-test" : end, ": ", text.empty() ? LastOutput(submission.directory) : text),
                "check worker, launcher and prologue in the site file; the worker must start on compute nodes");
}

std::string SlurmScheduler::LastOutput(const AttemptDirectory& directory) {
  return ReadFile(directory.script_log_path(), 1 << 16).value_or("it printed nothing");
}

}  // namespace itwin::agent

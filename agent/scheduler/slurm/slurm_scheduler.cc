#include "agent/scheduler/slurm/slurm_scheduler.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "agent/scheduler/lease.h"
#include "agent/spool/fault_point.h"
#include "agent/spool/lifecycle.h"
#include "common/files.h"
#include "common/ids.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

using nlohmann::json;

// sbatch itself waits and tries again for about two minutes when the controller asks it to.
constexpr absl::string_view kConfigurationNotAvailable = "Requested node configuration is not available";
constexpr absl::Duration kSbatchLimit = absl::Seconds(180);
constexpr absl::Duration kQueryLimit = absl::Seconds(120);
constexpr absl::Duration kPingLimit = absl::Seconds(60);
// A controller that answered this recently is up; a burst of submissions asks once.
constexpr absl::Duration kPingAge = absl::Seconds(2);
// A first submission looks for its name in a look this old: nobody but us makes such names, and we have not yet.
constexpr absl::Duration kFreshLookAge = absl::Seconds(10);
constexpr absl::Duration kShapeAge = absl::Minutes(10);
constexpr size_t kMaxShapes = 1000;
constexpr absl::Duration kFactsAge = absl::Minutes(10);
constexpr absl::Duration kAccountingInterval = absl::Seconds(15);
constexpr absl::Duration kAccountingWindow = absl::Hours(24 * 14);
constexpr size_t kNamesPerCall = 200;
constexpr int64_t kScriptLogTail = 2000;

// A clock that does not jump; only differences mean anything.
absl::Time SteadyNow() {
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return absl::TimeFromTimespec(now);
}

std::string RecordPath(const AttemptDirectory& directory) { return directory.path() + "/slurm.json"; }
std::string BatchPath(const AttemptDirectory& directory) { return directory.path() + "/batch.sh"; }

std::string LastWords(const AttemptDirectory& directory) {
  const absl::StatusOr<std::string> text = ReadFile(directory.script_log_path(), 1 << 20);
  if (!text.ok() || text->empty()) return "";
  return absl::StrCat(": ", text->substr(text->size() > kScriptLogTail ? text->size() - kScriptLogTail : 0));
}

// One job in its first life that waits or runs: the spool has nothing to say about that, and there may be thousands.
bool IsPlain(const std::vector<SlurmJobRow>& rows) {
  if (rows.size() != 1 || rows[0].restarts > 0) return false;
  if (rows[0].state == SlurmState::kPending) return ExplainPending(rows[0].reason).kind != ReasonKind::kPermanent;
  return rows[0].state == SlurmState::kRunning || rows[0].state == SlurmState::kConfiguring;
}

google::protobuf::Duration ToProto(absl::Duration duration) {
  google::protobuf::Duration out;
  out.set_seconds(absl::ToInt64Seconds(duration));
  return out;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SlurmScheduler>> SlurmScheduler::Create(Options options) {
  ITWIN_ASSIGN_OR_RETURN(SlurmCommands::Programs programs, SlurmCommands::Find(options.path));
  return std::unique_ptr<SlurmScheduler>(new SlurmScheduler(std::move(options), std::move(programs)));
}

// ---- what the site is ----

absl::StatusOr<std::shared_ptr<const SlurmScheduler::Facts>> SlurmScheduler::ReadFacts() {
  const SlurmCommands::Programs& programs = commands_.programs();
  auto out = std::make_shared<Facts>();
  const auto run = [&](const std::string& program, std::vector<std::string> arguments) -> absl::StatusOr<CommandOutput> {
    ITWIN_ASSIGN_OR_RETURN(CommandOutput output, commands_.Run(program, std::move(arguments), kQueryLimit));
    if (output.exit.exit_code != 0 || output.exit.signal != 0) return absl::UnavailableError(WordsOf(output));
    return output;
  };
  ITWIN_ASSIGN_OR_RETURN(const CommandOutput config_text, run(programs.scontrol, {"show", "config"}));
  std::map<std::string, std::string> config = ParseConfig(config_text.out);
  out->facts.set_version(ParseVersion(config["SLURM_VERSION"]));
  out->facts.set_cluster(config["ClusterName"]);
  if (const auto age = ParseConfigSeconds(config["MinJobAge"])) *out->facts.mutable_min_job_age() = ToProto(*age);
  out->facts.set_accounting(!programs.sacct.empty() && !config["AccountingStorageType"].empty() &&
                            !absl::StrContains(config["AccountingStorageType"], "none"));
  if (const auto wait = ParseConfigSeconds(config["KillWait"])) out->site.kill_wait = *wait;
  out->preempt_mode = config["PreemptMode"];
  out->requeue_by_default = config["JobRequeue"] == "1";
  if (out->facts.version().empty()) {
    const absl::StatusOr<CommandOutput> version = run(programs.sinfo.empty() ? programs.squeue : programs.sinfo, {"-V"});
    if (version.ok()) out->facts.set_version(ParseVersion(version->out));
  }
  out->site.version = VersionNumber(out->facts.version());
  ITWIN_ASSIGN_OR_RETURN(const CommandOutput partition_text, run(programs.scontrol, {"-a", "-o", "show", "partition"}));
  std::vector<v1::Partition> partitions = ParsePartitions(partition_text.out);
  if (!programs.sinfo.empty()) {
    const absl::StatusOr<CommandOutput> nodes = run(programs.sinfo, {"-h", "-a", "-o", NodesFormat()});
    if (nodes.ok()) AddNodeSizes(nodes->out, &partitions);
  }
  for (v1::Partition& partition : partitions) *out->facts.add_partitions() = std::move(partition);
  if (!programs.srun.empty()) {
    const absl::StatusOr<CommandOutput> list = commands_.Run(programs.srun, {"--mpi=list"}, kQueryLimit);
    if (list.ok()) {
      for (std::string& plugin : ParseMpiPlugins(list->out + "\n" + list->err)) out->facts.add_mpi_plugins(std::move(plugin));
    }
  }
  out->read = SteadyNow();
  absl::MutexLock lock(&mu_);
  facts_ = out;
  return std::shared_ptr<const Facts>(out);
}

// The last facts, however old while SLURM cannot be asked; one caller at a time asks.
absl::StatusOr<std::shared_ptr<const SlurmScheduler::Facts>> SlurmScheduler::KnownFacts() {
  {
    absl::MutexLock lock(&mu_);
    const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !reading_facts_; };
    if (facts_ != nullptr && (reading_facts_ || SteadyNow() - facts_->read < kFactsAge)) return facts_;
    mu_.Await(absl::Condition(&ready));
    if (facts_ != nullptr && SteadyNow() - facts_->read < kFactsAge) return facts_;
    reading_facts_ = true;
  }
  absl::StatusOr<std::shared_ptr<const Facts>> read = ReadFacts();
  absl::MutexLock lock(&mu_);
  reading_facts_ = false;
  if (read.ok() || facts_ == nullptr) return read;
  return facts_;
}

SchedulerDescription SlurmScheduler::Describe() {
  SchedulerDescription out{.kind = "slurm"};
  out.calls_per_minute = commands_.calls_per_minute();
  absl::MutexLock lock(&mu_);
  if (facts_ == nullptr) return out;
  out.slurm = facts_->facts;
  // Finished jobs must be seen at least twice before the queue forgets them; 0 is: never.
  const absl::Duration age = absl::Seconds(facts_->facts.min_job_age().seconds());
  if (age > absl::ZeroDuration()) {
    out.longest_interval = std::clamp(age / 3, options_.rules.between, absl::Seconds(60));
  }
  return out;
}

absl::StatusOr<std::string> SlurmScheduler::DefaultLauncher() {
  ITWIN_ASSIGN_OR_RETURN(const std::shared_ptr<const Facts> facts, KnownFacts());
  const auto& plugins = facts->facts.mpi_plugins();
  const bool pmix = std::any_of(plugins.begin(), plugins.end(), [](const std::string& p) { return absl::StartsWith(p, "pmix"); });
  // One dead rank ends the job at once; a rank that ended well gives the others a minute.
  if (pmix) return std::string("srun --mpi=pmix --nodes={nodes} --ntasks={ranks} --ntasks-per-node={ranks_per_node} "
                               "--kill-on-bad-exit=1 --wait=60");
  return std::string("mpirun -n {ranks} --map-by ppr:{ranks_per_node}:node --bind-to none");
}

// ---- looking ----

absl::Status SlurmScheduler::CheckController() {
  const absl::Time now = SteadyNow();
  {
    absl::MutexLock lock(&mu_);
    if (now - controller_up_ < kPingAge) return absl::OkStatus();
  }
  absl::StatusOr<CommandOutput> ping = commands_.Run(commands_.programs().scontrol, {"ping"}, kPingLimit);
  if (!ping.ok()) return absl::UnavailableError(absl::StrCat("SLURM's controller cannot be asked: ", ping.status().message()));
  if (!ParsePing(ping->out)) {
    return absl::UnavailableError(absl::StrCat("SLURM's controller does not answer: ", WordsOf(*ping)));
  }
  absl::MutexLock lock(&mu_);
  controller_up_ = now;
  return absl::OkStatus();
}

absl::StatusOr<CommandOutput> SlurmScheduler::RunQueue(bool long_format) {
  std::vector<std::string> arguments = {"--me", "--noheader", "--all", "--states=all"};
  arguments.push_back(long_format ? "-O" : "-o");
  arguments.push_back(long_format ? QueueLongFormat() : QueueShortFormat());
  return commands_.Run(commands_.programs().squeue, std::move(arguments), kQueryLimit);
}

absl::StatusOr<SlurmScheduler::LookPointer> SlurmScheduler::TakeLook() {
  auto out = std::make_shared<Look>();
  out->begun = SteadyNow();
  bool long_format;
  {
    absl::MutexLock lock(&mu_);
    long_format = !short_queue_;
  }
  const auto failed = [](const CommandOutput& output) { return output.exit.exit_code != 0 || output.exit.signal != 0; };
  ITWIN_ASSIGN_OR_RETURN(CommandOutput output, RunQueue(long_format));
  if (long_format && failed(output) && absl::StrContains(absl::AsciiStrToLower(output.err), "format")) {
    ITWIN_ASSIGN_OR_RETURN(output, RunQueue(false));
    long_format = false;
  }
  if (failed(output) || output.truncated) return absl::UnavailableError(absl::StrCat("squeue: ", WordsOf(output)));
  SlurmRows rows = long_format ? ParseQueueLong(output.out) : ParseQueueShort(output.out);
  if (long_format && rows.rows.empty() && rows.bad > 0) {
    // It took the format without error and wrote something else: an old one.
    ITWIN_ASSIGN_OR_RETURN(output, RunQueue(false));
    if (failed(output) || output.truncated) return absl::UnavailableError(absl::StrCat("squeue: ", WordsOf(output)));
    rows = ParseQueueShort(output.out);
    long_format = rows.rows.empty();
  }
  for (SlurmJobRow& row : rows.rows) {
    if (!absl::StartsWith(row.name, options_.name_prefix)) continue;
    out->by_name[row.name].push_back(std::move(row));
  }
  absl::MutexLock lock(&mu_);
  if (!long_format) short_queue_ = true;
  if (rows.bad > 0 && bad_rows_ == 0) log::Warn("squeue printed {} rows that cannot be read; they are left out", rows.bad);
  bad_rows_ += rows.bad;
  unrecognized_states_ += rows.unrecognized;
  controller_up_ = out->begun;
  return LookPointer(out);
}

// One squeue at a time, shared by all who need one that is as young.
absl::StatusOr<SlurmScheduler::LookPointer> SlurmScheduler::LookBegunAfter(absl::Time time) {
  {
    absl::MutexLock lock(&mu_);
    const auto free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !looking_; };
    while (true) {
      if (look_ != nullptr && look_->begun >= time) return look_;
      if (failed_look_begun_ >= time) return failed_look_;
      if (!looking_) break;
      mu_.Await(absl::Condition(&free));
    }
    looking_ = true;
  }
  const absl::Time begun = SteadyNow();
  absl::StatusOr<LookPointer> taken = TakeLook();
  absl::MutexLock lock(&mu_);
  looking_ = false;
  if (taken.ok()) {
    look_ = *taken;
  } else {
    failed_look_begun_ = begun;
    failed_look_ = taken.status();
  }
  return taken;
}

// ---- the spool's side ----

SpoolView SlurmScheduler::ViewSpool(const AttemptKey& key) const {
  const AttemptDirectory directory = DirectoryOf(key);
  SpoolView out;
  out.cancelled = directory.IsCancelled();
  const std::optional<LeaseOwner> owner = ReadLease(directory);
  if (!owner) return out;
  out.lease = true;
  out.lease_restart = owner->restart;
  const Lifecycle lifecycle = ReadLifecycle(directory.lifecycle_path());
  out.exited = lifecycle.exited.has_value();
  out.duplicates = lifecycle.duplicates;
  out.beat = ReadFile(directory.beat_path(), 256).value_or("");
  if (!out.exited) {
    const std::string words = absl::AsciiStrToLower(ReadFile(directory.script_log_path(), 1 << 16).value_or(""));
    out.over_memory = absl::StrContains(words, "exceeded job memory limit") || absl::StrContains(words, "oom-kill") ||
                      absl::StrContains(words, "oom_kill");
  }
  return out;
}

void SlurmScheduler::Load(const AttemptKey& key) {
  {
    absl::MutexLock lock(&mu_);
    if (tracks_.count(key) > 0) return;
  }
  // What an earlier agent recorded. A record that cannot be read is one that was begun: doubt.
  const absl::StatusOr<std::string> text = ReadFile(RecordPath(DirectoryOf(key)), 1 << 16);
  std::string id;
  const json record = text.ok() ? json::parse(*text, nullptr, /*allow_exceptions=*/false) : json();
  if (record.is_object() && record.contains("id") && record["id"].is_string()) id = record["id"].get<std::string>();
  absl::MutexLock lock(&mu_);
  const auto [it, fresh] = tracks_.try_emplace(key, key, options_.rules);
  if (fresh && !absl::IsNotFound(text.status())) it->second.Restore(id, SteadyNow());
}

JobTrack& SlurmScheduler::TrackOf(const AttemptKey& key) {
  return tracks_.try_emplace(key, key, options_.rules).first->second;
}

void SlurmScheduler::Record(const AttemptKey& key, const std::string& id, std::optional<absl::Time> submitted) {
  json record = {{"name", NameOf(key)}, {"id", id}};
  if (submitted) record["submitted"] = absl::ToUnixSeconds(*submitted);
  const absl::Status written = WriteFileAtomically(RecordPath(DirectoryOf(key)), record.dump() + "\n");
  // Without it the id is found again by the name.
  if (!written.ok()) log::Warn("attempt {}: {}", key.text(), std::string(written.message()));
}

// Takes the lease for nobody. False: somebody has it, so the attempt has begun after all, or it cannot be told now.
bool SlurmScheduler::Fence(const AttemptKey& key) {
  const AttemptDirectory directory = DirectoryOf(key);
  if (!directory.HasRequest()) return true;
  const absl::StatusOr<bool> taken = TakeLease(
      directory, {.nonce = absl::StrCat("fence-", RandomHex(16)), .host = HostName(), .scheduler_id = "", .process = {}});
  if (!taken.ok()) log::Warn("attempt {}: {}", key.text(), std::string(taken.status().message()));
  if (taken.ok() && *taken) return true;
  // An earlier agent may have put the same fence there.
  const std::optional<LeaseOwner> owner = ReadLease(directory);
  return owner && absl::StartsWith(owner->nonce, "fence-");
}

// ---- submitting ----

absl::Status SlurmScheduler::Preflight(const Submission& submission, const std::vector<std::string>& options,
                                       const Facts& facts) {
  // SLURM accepts some of these and lets them wait for ever.
  const std::string& wanted = submission.slurm.partition();
  std::string used = wanted;
  bool known = wanted.empty() || absl::StrContains(wanted, ",");
  for (const v1::Partition& partition : facts.facts.partitions()) {
    if (wanted.empty() ? !partition.is_default() : partition.name() != wanted) continue;
    known = true;
    used = partition.name();
    const absl::Duration granted = GrantedTime(submission), limit = absl::Seconds(partition.max_time().seconds());
    if (partition.has_max_time() && granted > limit) {
      return absl::FailedPreconditionError(absl::StrCat("partition ", partition.name(), " allows at most ", absl::FormatDuration(limit),
                                                        ", but the job asks for ", absl::FormatDuration(granted),
                                                        "; ask for less with resources.time, or name another partition"));
    }
    const int most = partition.max_nodes_per_job() > 0 ? std::min(partition.nodes(), partition.max_nodes_per_job()) : partition.nodes();
    if (partition.nodes() > 0 && submission.nodes > most) {
      return absl::FailedPreconditionError(absl::StrCat("partition ", partition.name(), " gives a job at most ", most,
                                                        " nodes, but it asks for ", submission.nodes));
    }
    const int64_t cpus = int64_t{submission.ranks_per_node} * std::max(1, submission.cpus_per_rank);
    if (partition.cpus_per_node() > 0 && cpus > partition.cpus_per_node()) {
      return absl::FailedPreconditionError(absl::StrCat("the nodes of partition ", partition.name(), " have at most ", partition.cpus_per_node(),
                                                        " CPUs, but the job asks for ", cpus, " per node (ranks_per_node × cpus_per_rank)"));
    }
    if (partition.memory_mib_per_node() > 0 && submission.memory_mib_per_node > partition.memory_mib_per_node()) {
      return absl::FailedPreconditionError(absl::StrCat("the nodes of partition ", partition.name(), " have at most ",
                                                        partition.memory_mib_per_node(), " MiB, but the job asks for ",
                                                        submission.memory_mib_per_node, " MiB per node"));
    }
  }
  if (!known && facts.facts.partitions_size() > 0) {
    std::vector<absl::string_view> names;
    for (const v1::Partition& partition : facts.facts.partitions()) names.push_back(partition.name());
    return absl::FailedPreconditionError(
        absl::StrCat("this cluster has no partition '", wanted, "'; it has ", absl::StrJoin(names, ", ")));
  }
  const std::string shape = ShapeOf(options);
  const absl::Time now = SteadyNow();
  {
    absl::MutexLock lock(&mu_);
    const auto it = shapes_.find(shape);
    if (it != shapes_.end() && now - it->second < kShapeAge) return absl::OkStatus();
  }
  std::vector<std::string> arguments = {"--test-only"};
  arguments.insert(arguments.end(), options.begin(), options.end());
  arguments.push_back(BatchPath(submission.directory));
  ITWIN_ASSIGN_OR_RETURN(const CommandOutput output, commands_.Run(commands_.programs().sbatch, std::move(arguments), kSbatchLimit));
  if (output.exit.exit_code != 0 || output.exit.signal != 0) {
    const std::string words = WordsOf(output);
    // Said of what can never run and of nodes that are drained or down just now alike; the second may wait.
    if (absl::StrContains(words, kConfigurationNotAvailable) && NodesAreOutOfUse(used)) return absl::OkStatus();
    if (IsRefusal(words)) return absl::FailedPreconditionError(absl::StrCat("SLURM refuses it: ", words));
    return absl::UnavailableError(absl::StrCat("SLURM could not be asked whether it takes the job: ", words));
  }
  absl::MutexLock lock(&mu_);
  if (shapes_.size() >= kMaxShapes) shapes_.clear();
  shapes_[shape] = now;
  return absl::OkStatus();
}

// Some node of the partition (empty: of any).
bool SlurmScheduler::NodesAreOutOfUse(const std::string& partition) {
  std::vector<std::string> arguments = {"-h", "-a", "-o", "%T"};
  if (!partition.empty()) arguments.insert(arguments.end(), {"-p", partition});
  const absl::StatusOr<CommandOutput> states = commands_.Run(commands_.programs().sinfo, std::move(arguments), kQueryLimit);
  // Where it cannot be told nothing is refused.
  return !states.ok() || states->exit.exit_code != 0 || AnyNodeOutOfUse(states->out);
}

absl::Status SlurmScheduler::Submit(const Submission& submission) {
  const AttemptDirectory& directory = submission.directory;
  const AttemptKey& key = directory.key();
  const std::string name = NameOf(key);
  Load(key);
  bool in_doubt;
  {
    absl::MutexLock lock(&mu_);
    const JobTrack& track = TrackOf(key);
    if (!track.id().empty()) return absl::OkStatus();
    in_doubt = track.in_doubt();
  }
  if (directory.HasLease()) return absl::OkStatus();
  ITWIN_ASSIGN_OR_RETURN(const std::vector<std::string> options, SbatchOptions(submission, name));
  ITWIN_RETURN_IF_ERROR(CheckController());
  ITWIN_ASSIGN_OR_RETURN(const std::shared_ptr<const Facts> facts, KnownFacts());
  // Whoever made such a job, it is ours: the name is the key.
  ITWIN_ASSIGN_OR_RETURN(const LookPointer look, LookBegunAfter(in_doubt ? SteadyNow() : SteadyNow() - kFreshLookAge));
  {
    const SpoolView spool = ViewSpool(key);
    absl::MutexLock lock(&mu_);
    JobTrack& track = TrackOf(key);
    const auto rows = look->by_name.find(name);
    if (rows != look->by_name.end() || in_doubt) {
      const Judgement judgement = track.Judge(rows == look->by_name.end() ? std::vector<SlurmJobRow>() : rows->second, {}, spool,
                                              look->begun, SteadyNow());
      if (!judgement.fence) track.Told(judgement.report);
      if (judgement.report.state != SchedulerState::kAbsent) {
        if (!track.id().empty()) return absl::OkStatus();  // adopted
        return absl::UnavailableError(judgement.report.reason);
      }
    }
  }
  ITWIN_RETURN_IF_ERROR(options_.may_act());
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(BatchPath(directory), RenderBatchScript(submission, facts->site), 0700));
  ITWIN_RETURN_IF_ERROR(Preflight(submission, options, *facts));
  if (directory.IsCancelled()) return absl::OkStatus();
  ITWIN_RETURN_IF_ERROR(options_.may_act());
  // From here on it may exist, whatever happens to us.
  ITWIN_RETURN_IF_ERROR(Annotate(
      WriteFileAtomically(RecordPath(directory), absl::StrCat("{\"name\":\"", name, "\",\"id\":\"\"}\n")), "cannot record the submission"));
  FaultPoint("slurm.recorded");
  return RunSbatch(submission, options, *facts);
}

absl::Status SlurmScheduler::RunSbatch(const Submission& submission, const std::vector<std::string>& options, const Facts& facts) {
  const AttemptDirectory& directory = submission.directory;
  const AttemptKey& key = directory.key();
  {
    absl::MutexLock lock(&mu_);
    TrackOf(key).Tried();
  }
  std::vector<std::string> arguments = options;
  arguments.push_back(BatchPath(directory));
  const absl::StatusOr<CommandOutput> output = commands_.Run(commands_.programs().sbatch, std::move(arguments), kSbatchLimit);
  const absl::Time ended = SteadyNow();
  FaultPoint("slurm.submitted");
  if (absl::IsNotFound(output.status()) || absl::IsPermissionDenied(output.status())) {
    // It never ran.
    unlink(RecordPath(directory).c_str());
    absl::MutexLock lock(&mu_);
    TrackOf(key).Refused();
    return absl::UnavailableError(output.status().message());
  }
  const std::string words = output.ok() ? WordsOf(*output) : std::string(output.status().message());
  if (output.ok() && output->exit.exit_code == 0 && output->exit.signal == 0) {
    if (const std::optional<SubmittedId> id = ParseSubmitted(output->out)) {
      absl::MutexLock lock(&mu_);
      TrackOf(key).Submitted(id->id, ended);
      controller_up_ = ended;
      return absl::OkStatus();
    }
  }
  {
    absl::MutexLock lock(&mu_);
    TrackOf(key).NoAnswer(ended);
    controller_up_ = absl::InfinitePast();
  }
  if (!IsRefusal(words) && !IsRefusedForNow(words)) {
    return absl::UnavailableError(absl::StrCat("sbatch gave no clear answer: ", words));
  }
  // Even with these words there may be a job under our name: dead ones are evidence of the refusal, a live one is ours.
  const absl::StatusOr<LookPointer> look = LookBegunAfter(ended);
  if (!look.ok()) return absl::UnavailableError(absl::StrCat("sbatch refused it, but the queue cannot be asked: ", words));
  const auto rows = (*look)->by_name.find(NameOf(key));
  if (rows != (*look)->by_name.end()) {
    for (const SlurmJobRow& row : rows->second) {
      if (IsTerminal(row.state)) continue;
      absl::MutexLock lock(&mu_);
      TrackOf(key).Submitted(row.id, ended);
      return absl::OkStatus();
    }
  }
  unlink(RecordPath(directory).c_str());
  absl::MutexLock lock(&mu_);
  TrackOf(key).Refused();
  shapes_.erase(ShapeOf(options));
  if (IsRefusedForNow(words)) return absl::UnavailableError(absl::StrCat("SLURM takes no more jobs for now: ", words));
  return absl::FailedPreconditionError(absl::StrCat("SLURM refuses it: ", words));
}

// ---- asking ----

std::map<std::string, std::vector<SlurmJobRow>> SlurmScheduler::AskAccounting(const std::vector<AttemptKey>& keys) {
  std::map<std::string, std::vector<SlurmJobRow>> out;
  std::vector<std::string> names;
  for (const AttemptKey& key : keys) names.push_back(NameOf(key));
  for (size_t begin = 0; begin < names.size(); begin += kNamesPerCall) {
    const size_t end = std::min(names.size(), begin + kNamesPerCall);
    const std::string list = absl::StrJoin(names.begin() + static_cast<std::ptrdiff_t>(begin),
                                           names.begin() + static_cast<std::ptrdiff_t>(end), ",");
    // Without a start it would only show what began today.
    const absl::StatusOr<CommandOutput> output = commands_.Run(
        commands_.programs().sacct,
        {"--parsable2", "--noheader", "--duplicates", "--delimiter=\x1f", absl::StrCat("--format=", kAccountingFields),
         absl::StrCat("--name=", list), absl::StrCat("--starttime=now-", absl::ToInt64Hours(kAccountingWindow), "hours")},
        kQueryLimit);
    if (!output.ok() || output->exit.exit_code != 0) {
      log::Warn("sacct: {}", output.ok() ? WordsOf(*output) : std::string(output.status().message()));
      continue;
    }
    SlurmRows rows = ParseAccounting(output->out);
    std::map<std::string, std::string> names_by_id;
    for (const SlurmJobRow& row : rows.rows) {
      if (!row.step) names_by_id[row.id] = row.name;
    }
    for (SlurmJobRow& row : rows.rows) {
      const auto name = names_by_id.find(row.id);  // steps have names of their own
      if (name != names_by_id.end()) out[name->second].push_back(std::move(row));
    }
    absl::MutexLock lock(&mu_);
    bad_rows_ += rows.bad;
    unrecognized_states_ += rows.unrecognized;
  }
  return out;
}

// Of these nodes, those that SLURM has down, not answering, or taken out.
std::vector<std::string> SlurmScheduler::FailedOf(const std::vector<std::string>& nodes) {
  if (nodes.size() <= 1) return nodes;
  const absl::StatusOr<CommandOutput> output =
      commands_.Run(commands_.programs().sinfo, {"-h", "-a", "-N", "-n", absl::StrJoin(nodes, ","), "-o", "%N\x1f%T"}, kQueryLimit);
  std::vector<std::string> out;
  if (!output.ok() || output->exit.exit_code != 0) return out;
  for (absl::string_view line : absl::StrSplit(output->out, '\n')) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line, '\x1f');
    if (fields.size() != 2) continue;
    const bool failed = absl::StrContains(fields[1], "down") || absl::StrContains(fields[1], "fail") ||
                        absl::StrContains(fields[1], "drain") || absl::StrContains(fields[1], "*");
    if (failed && std::find(out.begin(), out.end(), fields[0]) == out.end()) out.emplace_back(fields[0]);
  }
  return out;
}

absl::StatusOr<std::map<AttemptKey, SchedulerReport>> SlurmScheduler::Query(const std::vector<AttemptKey>& keys) {
  ITWIN_ASSIGN_OR_RETURN(const LookPointer look, LookBegunAfter(SteadyNow()));
  const absl::StatusOr<std::shared_ptr<const Facts>> facts = KnownFacts();
  const bool accounting = facts.ok() && (*facts)->facts.accounting();

  std::map<AttemptKey, Judgement> judgements;
  const auto judge = [&](const AttemptKey& key) {
    Load(key);
    const auto rows = look->by_name.find(NameOf(key));
    const SpoolView spool = rows != look->by_name.end() && IsPlain(rows->second) ? SpoolView{} : ViewSpool(key);
    absl::MutexLock lock(&mu_);
    const auto known = accounting_.find(NameOf(key));
    judgements[key] = TrackOf(key).Judge(rows == look->by_name.end() ? std::vector<SlurmJobRow>() : rows->second,
                                         known == accounting_.end() ? std::vector<SlurmJobRow>() : known->second, spool,
                                         look->begun, SteadyNow());
  };
  for (const AttemptKey& key : keys) judge(key);

  std::vector<AttemptKey> lost;
  for (const auto& [key, judgement] : judgements) {
    if (judgement.ask_accounting) lost.push_back(key);
  }
  bool ask = accounting && !lost.empty();
  if (ask) {
    absl::MutexLock lock(&mu_);
    ask = SteadyNow() >= next_accounting_;
    if (ask) next_accounting_ = SteadyNow() + kAccountingInterval;
  }
  if (ask) {
    std::map<std::string, std::vector<SlurmJobRow>> rows = AskAccounting(lost);
    {
      absl::MutexLock lock(&mu_);
      accounting_ = std::move(rows);
    }
    for (const AttemptKey& key : lost) judge(key);
  }

  std::map<AttemptKey, SchedulerReport> out;
  for (auto& [key, judgement] : judgements) {
    SchedulerReport& report = judgement.report;
    std::string id;
    std::optional<absl::Time> submitted;
    SchedulerReport last;
    {
      absl::MutexLock lock(&mu_);
      const JobTrack& track = TrackOf(key);
      id = track.id();
      submitted = track.submitted();
      last = track.last();
    }
    if (judgement.record && options_.may_act().ok()) Record(key, id, submitted);
    if (judgement.cancel) (void)CancelJob(key, id);
    for (const std::string& surplus : judgement.surplus) {
      log::Warn("attempt {}: SLURM job {} is a second one of it and is taken out of the queue", key.text(), surplus);
      (void)CancelJob(key, surplus);
    }
    if (judgement.fence && !(options_.may_act().ok() && Fence(key))) {
      // Not concluded: it may have begun in this moment. The next look tells.
      report = last;
    } else if (judgement.fence && report.cause == v1::END_CAUSE_LAUNCH_FAILED) {
      absl::StrAppend(&report.reason, LastWords(DirectoryOf(key)));
    }
    if (judgement.ask_nodes && report.state == SchedulerState::kEnded) {
      report.bad_nodes = last.state == SchedulerState::kEnded ? last.bad_nodes : FailedOf(report.nodes);
    }
    if (report.state == SchedulerState::kAbsent && last.state != SchedulerState::kAbsent) unlink(RecordPath(DirectoryOf(key)).c_str());
    absl::MutexLock lock(&mu_);
    TrackOf(key).Told(report);
    out[key] = report;
  }
  return out;
}

SchedulerReport SlurmScheduler::Recall(const AttemptKey& key) {
  absl::MutexLock lock(&mu_);
  const auto it = tracks_.find(key);
  return it == tracks_.end() ? SchedulerReport{} : it->second.last();
}

void SlurmScheduler::Forget(const AttemptKey& key) {
  absl::MutexLock lock(&mu_);
  tracks_.erase(key);
  accounting_.erase(NameOf(key));
}

// ---- cancelling ----

// With the name as guard: an id that SLURM has given to another job by now is not touched.
absl::Status SlurmScheduler::CancelJob(const AttemptKey& key, const std::string& id) {
  ITWIN_RETURN_IF_ERROR(options_.may_act());
  std::vector<std::string> arguments = {absl::StrCat("--name=", NameOf(key))};
  bool own_users_only;
  {
    absl::MutexLock lock(&mu_);
    own_users_only = facts_ != nullptr && facts_->site.version > 0 && facts_->site.version < 220500;
  }
  arguments.push_back(own_users_only ? absl::StrCat("--user=", geteuid()) : "--me");
  if (!id.empty()) arguments.push_back(id);
  absl::StatusOr<CommandOutput> output = commands_.Run(commands_.programs().scancel, std::move(arguments), kQueryLimit);
  if (!output.ok()) return absl::UnavailableError(absl::StrCat("scancel: ", output.status().message()));
  if (output->exit.exit_code == 0 && output->exit.signal == 0) return absl::OkStatus();
  const std::string words = WordsOf(*output);
  // Over already.
  if (absl::StrContains(words, "Invalid job id") || absl::StrContains(words, "already completed")) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("scancel: ", words));
}

absl::Status SlurmScheduler::Cancel(const AttemptKey& key) {
  Load(key);
  const bool lease = DirectoryOf(key).HasLease();
  std::string id;
  {
    absl::MutexLock lock(&mu_);
    const JobTrack& track = TrackOf(key);
    if (!track.tried() && !lease && look_ != nullptr && look_->by_name.count(NameOf(key)) == 0) {
      return absl::OkStatus();  // never given to SLURM
    }
    if (track.trusted()) id = track.id();
  }
  return CancelJob(key, id);
}

int64_t SlurmScheduler::bad_rows() const {
  absl::MutexLock lock(&mu_);
  return bad_rows_;
}

int64_t SlurmScheduler::unrecognized_states() const {
  absl::MutexLock lock(&mu_);
  return unrecognized_states_;
}

}  // namespace itwin::agent

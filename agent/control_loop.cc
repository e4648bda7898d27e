#include "agent/control_loop.h"

#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "agent/spool/fault_point.h"
#include "agent/spool/lifecycle.h"
#include "agent/spool/spool_files.h"
#include "common/ids.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

constexpr int kMaxInputs = 10'000;
constexpr int kMaxRanks = 1'000'000;
// Between two looks at a queue in which something has just changed; without changes they come ever more seldom.
constexpr absl::Duration kShortestInterval = absl::Seconds(2);
constexpr double kCalmer = 1.5;
constexpr absl::Duration kRetryQuery = absl::Seconds(2);
constexpr absl::Duration kRetryAction = absl::Seconds(10);
// At once: enough to keep a scheduler's controller busy, few enough not to trouble it.
constexpr int kActingThreads = 8;
constexpr int kFileThreads = 2;

absl::Duration TimeOf(const v1::StartAttemptRequest& request) {
  if (!request.has_time() || request.time().seconds() <= 0) return absl::InfiniteDuration();
  return absl::Seconds(request.time().seconds());
}

bool InDoubt(const absl::Status& status) { return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status); }

// All but the bar against a later start.
void RemoveHalfMade(const AttemptDirectory& directory) {
  std::error_code error;
  std::vector<std::string> paths;
  for (std::filesystem::directory_iterator it(directory.path(), error), end; !error && it != end; it.increment(error)) {
    if (it->path() != directory.cancelled_path()) paths.push_back(it->path().string());
  }
  for (const std::string& path : paths) RemoveTree(path).IgnoreError();
  rmdir(directory.path().c_str());
  rmdir(directory.job_path().c_str());
}

}  // namespace

ControlLoop::ControlLoop(Options options, Scheduler* scheduler, InputStore* inputs, FollowLoop* follow)
    : options_(std::move(options)), scheduler_(scheduler), inputs_(inputs), follow_(follow), interval_(kShortestInterval) {
  if (quick()) return;
  acting_ = std::make_unique<WorkPool>(kActingThreads);
  asking_ = std::make_unique<WorkPool>(1);
  files_ = std::make_unique<WorkPool>(kFileThreads);
}

ControlLoop::~ControlLoop() { Stop(); }

void ControlLoop::Start() { thread_ = std::thread([this] { Run(); }); }

void ControlLoop::Stop() {
  if (thread_.joinable()) {
    mailbox_.Post([this] { stopping_ = true; });
    thread_.join();
  }
  for (WorkPool* pool : {acting_.get(), asking_.get(), files_.get()}) {
    if (pool != nullptr) pool->Stop();
  }
  mailbox_.Close();
}

void ControlLoop::Run() {
  while (!stopping_) {
    const absl::Duration left = std::max(next_query_ - absl::Now(), absl::ZeroDuration());
    const timespec limit = absl::ToTimespec(std::min(left, absl::Hours(1)));
    pollfd entries[2] = {{mailbox_.fd(), POLLIN, 0}, {scheduler_->change_fd(), POLLIN, 0}};
    ppoll(entries, 2, &limit, nullptr);
    if (entries[0].revents != 0) mailbox_.RunPosted();
    if (entries[1].revents != 0 || absl::Now() >= next_query_) QueryLive();
  }
}

void ControlLoop::Aside(WorkPool* pool, std::function<absl::Status()> work, Done then) {
  if (pool == nullptr) {
    then(work());
    return;
  }
  pool->Run([this, work = std::move(work), then = std::move(then)] {
    mailbox_.Post([then, status = work()] { then(status); });
  });
}

void ControlLoop::Tell(const AttemptKey& key, const SchedulerReport& report) {
  follow_->Post([follow = follow_, key, report] {
    follow->Report(key, report);
    (void)follow->Status(key, false);  // what we wrote into the spool is news, too
  });
}

void ControlLoop::Drop(const AttemptKey& key) {
  live_.erase(key);
  scheduler_->Forget(key);
}

void ControlLoop::LearnSite(Done done) {
  if (quick() || scheduler_->Describe().slurm) return done(absl::OkStatus());
  Aside(asking_.get(), [this] { return scheduler_->LearnSite(), absl::OkStatus(); }, std::move(done));
}

// ---- looking ----

void ControlLoop::LookSoon() {
  interval_ = kShortestInterval;
  next_query_ = std::min(next_query_, std::max(absl::Now(), last_query_ + std::max(kShortestInterval, least_interval_)));
}

void ControlLoop::QueryLive() {
  const absl::Time now = absl::Now();
  next_query_ = absl::InfiniteFuture();
  if (querying_) return;
  std::vector<AttemptKey> keys;
  for (const auto& [key, live] : live_) keys.push_back(key);
  if (quick()) {
    OnReports(scheduler_->Query(keys));
    return;
  }
  if (keys.empty()) {
    if (!looked_.HasBeenNotified()) looked_.Notify();
    return;
  }
  querying_ = true;
  last_query_ = now;
  asking_->Run([this, keys = std::move(keys)] {
    mailbox_.Post([this, reports = scheduler_->Query(keys)] {
      querying_ = false;
      OnReports(reports);
    });
  });
}

void ControlLoop::OnReports(const absl::StatusOr<std::map<AttemptKey, SchedulerReport>>& reports) {
  const absl::Time now = absl::Now();
  if (!looked_.HasBeenNotified()) looked_.Notify();
  if (!reports.ok()) {
    // Says nothing about the attempts: they stay what they are.
    log::Warn("the scheduler cannot be asked: {}", std::string(reports.status().message()));
    next_query_ = std::min(next_query_, now + std::max(kRetryQuery, least_interval_));
    return;
  }
  bool changed = false;
  for (const auto& [key, report] : *reports) {
    const auto it = live_.find(key);
    if (it == live_.end()) continue;
    if (it->second.report != report) {
      changed = true;
      it->second.report = report;
    }
  }
  follow_->Post([follow = follow_, reports = *reports] {
    for (const auto& [key, report] : reports) follow->Report(key, report);
  });
  for (const auto& [key, report] : *reports) Tend(key, report);
  if (quick()) return;
  interval_ = changed ? kShortestInterval
                      : std::min(interval_ * kCalmer, std::max(scheduler_->Describe().longest_interval, kShortestInterval));
  if (!live_.empty()) next_query_ = std::min(next_query_, now + std::max(interval_, least_interval_));
}

// What an attempt needs beside being told about: a submission that came to nothing, a cancel that was not heard.
void ControlLoop::Tend(const AttemptKey& key, const SchedulerReport& report) {
  const auto it = live_.find(key);
  if (it == live_.end() || it->second.working) return;
  Live& live = it->second;
  const absl::Time now = absl::Now();
  const AttemptDirectory directory = DirectoryOf(key);
  if (live.cancel) {
    if (report.state == SchedulerState::kAbsent || report.state == SchedulerState::kEnded || now < live.next_try) return;
    CancelNow(key, [](const absl::Status&) {});
    return;
  }
  if (report.state != SchedulerState::kAbsent || now < live.next_try || directory.HasLease() || directory.IsCancelled() ||
      FileExists(directory.launch_error_path()) || !directory.HasRequest()) {
    return;
  }
  live.working = true;
  Aside(acting_.get(), [this, directory] { return Resume(directory); },
        [this, key](const absl::Status& status) {
          if (status.ok()) log::Info("attempt {}: its start was interrupted and is now done", key.text());
          OnStarted(key, status);
        });
}

absl::Status ControlLoop::CheckRequest(const AttemptDirectory& directory, const v1::StartAttemptRequest& request) {
  const int64_t ranks =
      int64_t{std::max(1, request.nodes())} * int64_t{std::max(1, request.ranks_per_node())};
  if (request.nodes() < 0 || request.ranks_per_node() < 0 || ranks > kMaxRanks) {
    return absl::InvalidArgumentError(absl::StrCat(request.nodes(), " nodes with ", request.ranks_per_node(),
                                                   " ranks each: at most ", kMaxRanks, " ranks are possible"));
  }
  if (request.inputs_size() > kMaxInputs) {
    return absl::InvalidArgumentError(
        absl::StrCat(request.inputs_size(), " inputs; at most ", kMaxInputs, " are possible, pack them into archives"));
  }
  ITWIN_RETURN_IF_ERROR(LaunchCommand(directory, request, options_.launch).status());
  for (const v1::StagedInput& input : request.inputs()) {
    ITWIN_RETURN_IF_ERROR(Annotate(CheckRelativePath(input.path()), "input"));
    ITWIN_ASSIGN_OR_RETURN(const InputState state, inputs_->Stat(input.sha256()));
    if (!state.complete) {
      return absl::FailedPreconditionError(absl::StrCat("input '", input.path(), "' (", input.sha256(),
                                                        ") is not complete at this site; upload it first"));
    }
  }
  for (const auto& [name, value] : request.env()) {
    if (name.empty() || name.find('=') != std::string::npos || name.find('\0') != std::string::npos ||
        value.find('\0') != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat("environment variable '", name, "': a name has no '=' and neither name nor value a NUL"));
    }
  }
  for (const std::string& argument : request.argv()) {
    if (argument.find('\0') != std::string::npos) return absl::InvalidArgumentError("an argument has a NUL byte");
  }
  if (!request.resume_attempt().empty()) {
    ITWIN_ASSIGN_OR_RETURN(const AttemptKey from, AttemptKey::Parse(request.resume_attempt()));
    if (!DirectoryOf(from).HasCheckpoint()) {
      return absl::FailedPreconditionError(
          absl::StrCat("there is no checkpoint of attempt ", from.text(), " at this site to go on from"));
    }
  }
  return absl::OkStatus();
}

// Everything the script needs. May be done again on top of a half-done one.
absl::Status ControlLoop::Prepare(const AttemptDirectory& directory, const v1::StartAttemptRequest& request) {
  for (const std::string& path : {directory.work_path(), directory.checkpoints_path(), directory.outputs_path()}) {
    ITWIN_RETURN_IF_ERROR(MakeDirectories(path));
  }
  FaultPoint("start.directories");
  for (const v1::StagedInput& input : request.inputs()) {
    const std::filesystem::path target = directory.work_path() + "/" + input.path();
    ITWIN_RETURN_IF_ERROR(MakeDirectories(target.parent_path().string()));
    ITWIN_RETURN_IF_ERROR(
        Annotate(inputs_->Place(input.sha256(), target.string(), input.executable()), "input '" + input.path() + "'"));
    FaultPoint("start.input");
  }
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(directory.spec_path(), request.spec_json()));
  FaultPoint("start.spec");
  return WriteFileAtomically(directory.script_path(),
                             RenderScript(directory, options_.agent_program, options_.launch), 0700);
}

absl::Status ControlLoop::Submit(const AttemptDirectory& directory, const v1::StartAttemptRequest& request) {
  const AttemptKey& key = directory.key();
  if (quick()) {
    ITWIN_ASSIGN_OR_RETURN(const auto reports, scheduler_->Query({key}));
    if (reports.at(key).state != SchedulerState::kAbsent) return absl::OkStatus();
  }
  ITWIN_RETURN_IF_ERROR(Prepare(directory, request));
  FaultPoint("start.prepared");
  return scheduler_->Submit({.directory = directory,
                             .nodes = std::max(1, request.nodes()),
                             .ranks_per_node = std::max(1, request.ranks_per_node()),
                             .cpus_per_rank = request.cpus_per_rank(),
                             .gpus_per_node = request.gpus_per_node(),
                             .memory_mib_per_node = request.memory_mib_per_node(),
                             .time = TimeOf(request),
                             .slurm = request.slurm()});
}

// ---- starting ----

void ControlLoop::StartAttempt(const v1::StartAttemptRequest& request, Done done) {
  const absl::StatusOr<AttemptKey> parsed = AttemptKey::Parse(request.attempt());
  if (!parsed.ok()) return done(parsed.status());
  const AttemptKey key = *parsed;
  if (const auto it = live_.find(key); it != live_.end()) {
    // Known: either it is being started, and this caller waits too, or QueryLive tells on.
    if (!it->second.working || it->second.cancel) return done(absl::OkStatus());
    it->second.starts.push_back(std::move(done));
    return;
  }
  Live& live = live_[key];
  live.working = true;
  live.starts.push_back(std::move(done));
  Aside(acting_.get(), [this, request] { return Begin(request); },
        [this, key](const absl::Status& status) { OnStarted(key, status); });
}

// Beside the loop. kAlreadyExists: it is over, or may never start; there is nothing to do.
absl::Status ControlLoop::Begin(const v1::StartAttemptRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(const AttemptKey key, AttemptKey::Parse(request.attempt()));
  const AttemptDirectory directory = DirectoryOf(key);
  const bool known = directory.HasRequest();
  if (FileExists(directory.ended_path()) || (!known && directory.IsCancelled())) return absl::AlreadyExistsError("over");
  if (known && (directory.HasLease() || directory.IsCancelled())) return absl::OkStatus();
  ITWIN_RETURN_IF_ERROR(options_.may_act());
  v1::StartAttemptRequest whole = request;
  if (!known) {
    if (whole.launch().launcher().empty() && (whole.train() || whole.mpi()) &&
        options_.launch.launcher == LaunchOptions().launcher) {
      ITWIN_ASSIGN_OR_RETURN(const std::string launcher, scheduler_->DefaultLauncher());
      if (!launcher.empty()) whole.mutable_launch()->set_launcher(launcher);
    }
    ITWIN_RETURN_IF_ERROR(CheckRequest(directory, whole));
    FaultPoint("start.begin");
    absl::Status made = MakeDirectories(directory.path());
    FaultPoint("start.directory");
    if (made.ok()) made = WriteFileAtomically(directory.request_path(), whole.SerializeAsString());
    if (!made.ok()) {
      RemoveHalfMade(directory);  // what is left has no request, and is removed at the next start
      return Annotate(made, "cannot record the attempt in the spool");
    }
    FaultPoint("start.request");
  }
  absl::Status submitted = Submit(directory, whole);
  if (!submitted.ok() && !InDoubt(submitted)) {
    // Refused: nothing half-done stays. The request goes first, so that a crash in between leaves nothing to submit.
    unlink(directory.request_path().c_str());
    FaultPoint("start.refused");
    RemoveHalfMade(directory);
  }
  return submitted;
}

// A start that was interrupted after its request was recorded. Beside the loop.
absl::Status ControlLoop::Resume(const AttemptDirectory& directory) {
  ITWIN_RETURN_IF_ERROR(options_.may_act());
  v1::StartAttemptRequest request;
  absl::StatusOr<std::string> bytes = ReadFile(directory.request_path());
  absl::Status status = bytes.status();
  if (status.ok() && !request.ParseFromString(*bytes)) status = absl::DataLossError("its request cannot be read");
  if (status.ok()) status = Submit(directory, request);
  if (!status.ok() && !InDoubt(status)) {
    WriteFileAtomically(directory.launch_error_path(), std::string(status.message())).IgnoreError();
  }
  return status;
}

void ControlLoop::OnStarted(const AttemptKey& key, const absl::Status& status) {
  Live& live = live_[key];
  live.working = false;
  std::vector<Done> starts;
  starts.swap(live.starts);
  const bool over = absl::IsAlreadyExists(status);
  if (status.ok()) {
    live.failures = 0;
    live.next_try = absl::InfinitePast();
  } else if (!over) {
    log::Warn("attempt {}: {}", key.text(), std::string(status.message()));
    live.next_try = absl::Now() + std::min(kShortestInterval * ++live.failures, kRetryAction);
  }
  const bool cancel = live.cancel;
  if (over || live.ended || (!status.ok() && !DirectoryOf(key).HasRequest())) {
    const bool nothing = !over && !live.ended;
    Drop(key);
    if (nothing) follow_->Post([follow = follow_, key] { follow->Forget(key); });
  } else {
    FaultPoint("start.submitted");
    if (quick()) {
      QueryLive();
    } else {
      SchedulerReport report = scheduler_->Recall(key);
      if (!status.ok() && report.state == SchedulerState::kUnknown && report.reason.empty()) {
        report.reason = std::string(status.message());
      }
      live.report = report;
      Tell(key, report);
      if (cancel) CancelNow(key, [](const absl::Status&) {});
      LookSoon();
    }
  }
  for (const Done& done : starts) done(over ? absl::OkStatus() : status);
}

// ---- cancelling and removing ----

void ControlLoop::CancelAttempt(const AttemptKey& key, const std::string& reason, Done done) {
  const AttemptDirectory directory = DirectoryOf(key);
  Aside(
      files_.get(),
      [this, directory, reason]() -> absl::Status {
        // kAlreadyExists: nothing is left to be ended.
        if (FileExists(directory.ended_path()) || ReadLifecycle(directory.lifecycle_path()).exited) {
          return absl::AlreadyExistsError("over");
        }
        FaultPoint("cancel.begin");
        if (!directory.IsCancelled()) {
          ITWIN_RETURN_IF_ERROR(options_.may_act());
          ITWIN_RETURN_IF_ERROR(MakeDirectories(directory.path()));
          ITWIN_RETURN_IF_ERROR(WriteFileAtomically(directory.cancelled_path(), reason.substr(0, 1000)));
        }
        FaultPoint("cancel.marked");
        return directory.HasRequest() ? absl::OkStatus() : absl::AlreadyExistsError("barred");
      },
      [this, key, done = std::move(done)](const absl::Status& marked) {
        const auto known = live_.find(key);
        if (absl::IsAlreadyExists(marked) && known == live_.end()) return done(absl::OkStatus());
        if (!marked.ok() && !absl::IsAlreadyExists(marked)) return done(marked);
        Live& live = live_[key];
        live.cancel = true;
        // A start under way looks for the mark itself, and is cancelled when it has come through.
        if (live.working) return done(absl::OkStatus());
        if (quick()) return CancelNow(key, done);
        // The mark is what was asked for; the scheduler hears of it in its own time, again and again until it listens.
        CancelNow(key, [](const absl::Status&) {});
        follow_->Post([follow = follow_, key] { (void)follow->Status(key, false); });
        done(absl::OkStatus());
      });
}

void ControlLoop::CancelNow(const AttemptKey& key, Done done) {
  Live& live = live_[key];
  live.cancel = true;
  live.working = true;
  live.next_try = absl::Now() + kRetryAction;
  Aside(acting_.get(), [this, key] { return scheduler_->Cancel(key); },
        [this, key, done = std::move(done)](const absl::Status& cancelled) {
          if (const auto it = live_.find(key); it != live_.end()) {
            it->second.working = false;
            if (it->second.ended) Drop(key);
          }
          FaultPoint("cancel.asked");
          if (!cancelled.ok()) log::Warn("attempt {}: {}", key.text(), std::string(cancelled.message()));
          if (quick()) {
            QueryLive();
          } else {
            LookSoon();
          }
          done(cancelled);
        });
}

absl::StatusOr<std::string> ControlLoop::RemoveAttempt(const AttemptKey& key) {
  const AttemptDirectory directory = DirectoryOf(key);
  if (!FileExists(directory.path())) return std::string();
  const auto live = live_.find(key);
  const bool working = live != live_.end() && live->second.working;
  if (working || (directory.HasRequest() && !FileExists(directory.ended_path()) && live != live_.end())) {
    return absl::FailedPreconditionError(
        absl::StrCat("attempt ", key.text(), " has not ended; cancel it first, then remove it"));
  }
  ITWIN_RETURN_IF_ERROR(options_.may_act());
  const std::string trash = absl::StrCat(options_.root, "/trash/", key.text(), "-", RandomHex(6));
  ITWIN_RETURN_IF_ERROR(MakeDirectories(options_.root + "/trash"));
  if (rename(directory.path().c_str(), trash.c_str()) != 0) return ErrnoStatus(errno, directory.path());
  FaultPoint("remove.renamed");
  rmdir(directory.job_path().c_str());
  Drop(key);
  follow_->Post([follow = follow_, key] { follow->Forget(key); });
  return trash;
}

void ControlLoop::Ended(const AttemptKey& key) {
  const auto it = live_.find(key);
  if (it == live_.end()) return;
  if (it->second.working) {
    it->second.ended = true;
  } else {
    Drop(key);
  }
}

absl::Status ControlLoop::Recover() {
  ITWIN_RETURN_IF_ERROR(RemoveTree(options_.root + "/trash"));
  ITWIN_ASSIGN_OR_RETURN(const std::vector<AttemptKey> keys, ListAttemptDirectories(options_.root));
  std::vector<AttemptKey> known;
  for (const AttemptKey& key : keys) {
    const AttemptDirectory directory = DirectoryOf(key);
    if (!directory.HasRequest()) {
      if (directory.IsCancelled()) continue;  // barred for ever
      log::Info("attempt {}: was only half made; removed", key.text());
      ITWIN_RETURN_IF_ERROR(RemoveTree(directory.path()));
      rmdir(directory.job_path().c_str());
      continue;
    }
    known.push_back(key);
    if (!FileExists(directory.ended_path())) live_[key].cancel = directory.IsCancelled();
  }
  log::Info("{} attempts in the spool, {} of them not over", known.size(), live_.size());
  follow_->Post([follow = follow_, known] {
    for (const AttemptKey& key : known) follow->Status(key, false);
  });
  QueryLive();
  return absl::OkStatus();
}

}  // namespace itwin::agent

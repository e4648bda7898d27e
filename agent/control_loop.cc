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
constexpr absl::Duration kRetryQuery = absl::Seconds(2);

absl::Duration TimeOf(const v1::StartAttemptRequest& request) {
  if (!request.has_time() || request.time().seconds() <= 0) return absl::InfiniteDuration();
  return absl::Seconds(request.time().seconds());
}

}  // namespace

ControlLoop::ControlLoop(Options options, Scheduler* scheduler, InputStore* inputs, FollowLoop* follow)
    : options_(std::move(options)), scheduler_(scheduler), inputs_(inputs), follow_(follow) {}

ControlLoop::~ControlLoop() { Stop(); }

void ControlLoop::Start() { thread_ = std::thread([this] { Run(); }); }

void ControlLoop::Stop() {
  if (!thread_.joinable()) return;
  mailbox_.Post([this] { stopping_ = true; });
  thread_.join();
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

void ControlLoop::QueryLive() {
  const absl::Time now = absl::Now();
  next_query_ = scheduler_->change_fd() >= 0 || live_.empty() ? absl::InfiniteFuture() : now + options_.query_interval;
  const auto reports = scheduler_->Query({live_.begin(), live_.end()});
  if (!reports.ok()) {
    // Says nothing about the attempts: they stay what they are.
    log::Warn("the scheduler cannot be asked: {}", std::string(reports.status().message()));
    next_query_ = std::min(next_query_, now + kRetryQuery);
    return;
  }
  follow_->Post([follow = follow_, reports = *reports] {
    for (const auto& [key, report] : reports) follow->Report(key, report);
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
  live_.insert(key);
  ITWIN_ASSIGN_OR_RETURN(const auto reports, scheduler_->Query({key}));
  if (reports.at(key).state != SchedulerState::kAbsent) return absl::OkStatus();
  ITWIN_RETURN_IF_ERROR(Prepare(directory, request));
  FaultPoint("start.prepared");
  return scheduler_->Submit({.directory = directory,
                             .nodes = std::max(1, request.nodes()),
                             .ranks_per_node = std::max(1, request.ranks_per_node()),
                             .cpus_per_rank = request.cpus_per_rank(),
                             .gpus_per_node = request.gpus_per_node(),
                             .memory_mib_per_node = request.memory_mib_per_node(),
                             .time = TimeOf(request)});
}

absl::Status ControlLoop::StartAttempt(const v1::StartAttemptRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(const AttemptKey key, AttemptKey::Parse(request.attempt()));
  const AttemptDirectory directory = DirectoryOf(key);
  const auto known = [&] { return FileExists(directory.ended_path()) || directory.HasLease(); };
  if (directory.HasRequest() && (live_.count(key) > 0 || known())) return absl::OkStatus();  // and QueryLive tells on
  if (directory.IsCancelled()) return absl::OkStatus();
  const bool fresh = !directory.HasRequest();
  if (fresh) {
    ITWIN_RETURN_IF_ERROR(CheckRequest(directory, request));
    FaultPoint("start.begin");
    absl::Status made = MakeDirectories(directory.path());
    FaultPoint("start.directory");
    if (made.ok()) made = WriteFileAtomically(directory.request_path(), request.SerializeAsString());
    if (!made.ok()) {
      RemoveTree(directory.path()).IgnoreError();  // what is left has no request, and is removed at the next start
      rmdir(directory.job_path().c_str());
      return Annotate(made, "cannot record the attempt in the spool");
    }
    FaultPoint("start.request");
  }
  const absl::Status submitted = Submit(directory, request);
  const bool in_doubt = absl::IsUnavailable(submitted) || absl::IsDeadlineExceeded(submitted);
  if (!submitted.ok() && !in_doubt) {
    // Refused: nothing half-done stays. The request goes first, so that a crash in between leaves nothing to submit.
    live_.erase(key);
    unlink(directory.request_path().c_str());
    FaultPoint("start.refused");
    RemoveTree(directory.path()).IgnoreError();
    rmdir(directory.job_path().c_str());
    follow_->Post([follow = follow_, key] { follow->Forget(key); });
    return submitted;
  }
  FaultPoint("start.submitted");
  QueryLive();
  return submitted;
}

absl::Status ControlLoop::CancelAttempt(const AttemptKey& key, const std::string& reason) {
  const AttemptDirectory directory = DirectoryOf(key);
  if (FileExists(directory.ended_path()) || ReadLifecycle(directory.lifecycle_path()).exited) return absl::OkStatus();
  FaultPoint("cancel.begin");
  if (!directory.IsCancelled()) {
    ITWIN_RETURN_IF_ERROR(MakeDirectories(directory.path()));
    ITWIN_RETURN_IF_ERROR(WriteFileAtomically(directory.cancelled_path(), reason.substr(0, 1000)));
  }
  FaultPoint("cancel.marked");
  if (!directory.HasRequest()) return absl::OkStatus();
  live_.insert(key);
  const absl::Status cancelled = scheduler_->Cancel(key);
  FaultPoint("cancel.asked");
  QueryLive();
  return cancelled;
}

absl::StatusOr<std::string> ControlLoop::RemoveAttempt(const AttemptKey& key) {
  const AttemptDirectory directory = DirectoryOf(key);
  if (!FileExists(directory.path())) return std::string();
  if (directory.HasRequest() && !FileExists(directory.ended_path())) {
    if (live_.count(key) > 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("attempt ", key.text(), " has not ended; cancel it first, then remove it"));
    }
  }
  const std::string trash = absl::StrCat(options_.root, "/trash/", key.text(), "-", RandomHex(6));
  ITWIN_RETURN_IF_ERROR(MakeDirectories(options_.root + "/trash"));
  if (rename(directory.path().c_str(), trash.c_str()) != 0) return ErrnoStatus(errno, directory.path());
  FaultPoint("remove.renamed");
  rmdir(directory.job_path().c_str());
  live_.erase(key);
  follow_->Post([follow = follow_, key] { follow->Forget(key); });
  return trash;
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
    if (!FileExists(directory.ended_path())) live_.insert(key);
  }
  if (!live_.empty()) {
    ITWIN_ASSIGN_OR_RETURN(const auto reports, scheduler_->Query({live_.begin(), live_.end()}));
    for (const auto& [key, report] : reports) {
      const AttemptDirectory directory = DirectoryOf(key);
      if (directory.IsCancelled()) {
        scheduler_->Cancel(key).IgnoreError();  // asked again when the user does
      } else if (report.state == SchedulerState::kAbsent && !directory.HasLease()) {
        Resume(directory);
      }
    }
  }
  log::Info("{} attempts in the spool, {} of them not over", known.size(), live_.size());
  follow_->Post([follow = follow_, known] {
    for (const AttemptKey& key : known) follow->Status(key, false);
  });
  QueryLive();
  return absl::OkStatus();
}

// A start that was interrupted after its request was recorded.
void ControlLoop::Resume(const AttemptDirectory& directory) {
  v1::StartAttemptRequest request;
  absl::StatusOr<std::string> bytes = ReadFile(directory.request_path());
  absl::Status status = bytes.status();
  if (status.ok() && !request.ParseFromString(*bytes)) status = absl::DataLossError("its request cannot be read");
  if (status.ok()) status = Submit(directory, request);
  if (status.ok()) {
    log::Info("attempt {}: its start was interrupted and is now done", directory.key().text());
    return;
  }
  log::Error("attempt {}: {}", directory.key().text(), std::string(status.message()));
  if (absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) return;
  WriteFileAtomically(directory.launch_error_path(), std::string(status.message())).IgnoreError();
}

}  // namespace itwin::agent

#include "agent/scheduler/process_scheduler.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "agent/scheduler/lease.h"
#include "agent/spool/fault_point.h"
#include "agent/spool/lifecycle.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

constexpr absl::Duration kRetryStart = absl::Seconds(1);
constexpr absl::Duration kCleanupLimit = absl::Seconds(10);
// Kernels before 5.3 have no pidfd; there the ends are looked for.
constexpr absl::Duration kPollWithoutPidfd = absl::Milliseconds(100);
constexpr int64_t kScriptLogTail = 2000;

// Another machine, as far as can be told: a container that was started anew has a new name but the same boot.
bool RunsElsewhere(const LeaseOwner& owner) {
  return !owner.host.empty() && owner.host != HostName() && owner.process.boot_id != IdentityOf(0).boot_id;
}

std::string LastWords(const AttemptDirectory& directory) {
  const absl::StatusOr<std::string> text = ReadFile(directory.script_log_path(), 1 << 20);
  if (!text.ok()) return "";
  const size_t begin = text->size() > kScriptLogTail ? text->size() - kScriptLogTail : 0;
  return text->substr(begin);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ProcessScheduler>> ProcessScheduler::Create(const Options& options, Clock* clock) {
  if (options.slots < 1) {
    return absl::InvalidArgumentError(absl::StrCat("--slots is ", options.slots, "; at least 1 is needed"));
  }
  std::unique_ptr<ProcessScheduler> out(new ProcessScheduler(options, clock));
  ITWIN_RETURN_IF_ERROR(MakeDirectories(options.root + "/queue"));
  out->epoll_ = FileDescriptor(epoll_create1(EPOLL_CLOEXEC));
  out->timer_ = FileDescriptor(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!out->epoll_.valid() || !out->timer_.valid()) return ErrnoStatus(errno, "process scheduler");
  epoll_event event{.events = EPOLLIN, .data = {}};
  epoll_ctl(out->epoll_.get(), EPOLL_CTL_ADD, out->timer_.get(), &event);
  ITWIN_RETURN_IF_ERROR(out->Recover());
  return out;
}

absl::Status ProcessScheduler::Recover() {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator it(options_.root + "/queue", error), end; !error && it != end;
       it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  if (error) return absl::UnavailableError(absl::StrCat(options_.root, "/queue: ", error.message()));
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    const std::string path = absl::StrCat(options_.root, "/queue/", name);
    const std::pair<std::string, std::string> parts = absl::StrSplit(name, absl::MaxSplits('-', 1));
    const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(parts.second);
    const absl::StatusOr<std::string> text = ReadFile(path, 64);
    int slots = 0;
    int64_t id = 0;
    if (!key.ok() || !text.ok() || !absl::SimpleAtoi(*text, &slots) || !absl::SimpleAtoi(parts.first, &id) || slots < 1) {
      log::Warn("queue file {} is not ours; removed", path);
      unlink(path.c_str());
      continue;
    }
    last_id_ = std::max(last_id_, id);
    auto entry = std::make_unique<Entry>();
    entry->key = *key;
    entry->id = absl::StrCat(id);
    entry->queue_path = path;
    entry->slots = slots;
    if (const std::optional<LeaseOwner> owner = ReadLease(DirectoryOf(*key))) {
      entry->running = true;
      entry->process = owner->process;
      log::Info("attempt {}: found {}", key->text(), IsAlive(owner->process) ? "running" : "ended");
    }
    entries_.push_back(std::move(entry));
    if (entries_.back()->running) Watch(*entries_.back());
  }
  // The first Query does the rest; this wakes the owner up for it.
  ArmTimer();
  itimerspec now{{0, 0}, {0, 1}};
  timerfd_settime(timer_.get(), 0, &now, nullptr);
  return absl::OkStatus();
}

SchedulerDescription ProcessScheduler::Describe() {
  return {.kind = "process", .slots = options_.slots, .slots_in_use = SlotsInUse()};
}

int ProcessScheduler::SlotsInUse() const {
  int used = 0;
  for (const auto& entry : entries_) used += entry->running ? entry->slots : 0;
  return used;
}

absl::Status ProcessScheduler::Submit(const Submission& submission) {
  const AttemptKey& key = submission.directory.key();
  const int slots = std::max(1, submission.nodes) * std::max(1, submission.ranks_per_node);
  if (std::any_of(entries_.begin(), entries_.end(), [&](const auto& entry) { return entry->key == key; })) {
    return absl::OkStatus();
  }
  if (submission.directory.HasLease()) return absl::OkStatus();
  if (slots > options_.slots) {
    return absl::FailedPreconditionError(
        absl::StrCat("the job asks for ", slots, " ranks, but this site runs at most ", options_.slots,
                     " at once; ask for fewer, or start the agent with --slots ", slots));
  }
  if (submission.gpus_per_node > 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("the job asks for ", submission.gpus_per_node, " GPUs per node; this site hands out none"));
  }
  last_id_ = std::max(last_id_ + 1, absl::ToUnixMicros(clock_->Now()));
  auto entry = std::make_unique<Entry>();
  entry->key = key;
  entry->id = absl::StrCat(last_id_);
  entry->slots = slots;
  entry->queue_path = absl::StrFormat("%s/queue/%018d-%s", options_.root, last_id_, key.text());
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(entry->queue_path, absl::StrCat(slots, "\n")));
  FaultPoint("scheduler.queued");
  entries_.push_back(std::move(entry));
  return absl::OkStatus();
}

absl::Status ProcessScheduler::Cancel(const AttemptKey& key) {
  for (const auto& entry : entries_) {
    if (entry->key != key) continue;
    if (!entry->running) {
      unlink(entry->queue_path.c_str());
      FaultPoint("scheduler.dequeued");
      std::erase_if(entries_, [&](const auto& other) { return other->key == key; });
    } else if (entry->kill_time == absl::InfiniteFuture()) {
      entry->kill_time = clock_->Now() + options_.kill_after;
      if (entry->child) {
        entry->child->Kill(SIGTERM);
      } else if (IsAlive(entry->process)) {
        kill(entry->process.pid, SIGTERM);
      }
      ArmTimer();
    }
    return absl::OkStatus();
  }
  return absl::OkStatus();
}

absl::StatusOr<std::map<AttemptKey, SchedulerReport>> ProcessScheduler::Query(const std::vector<AttemptKey>& keys) {
  Advance();
  const std::set<AttemptKey> wanted(keys.begin(), keys.end());
  std::map<AttemptKey, SchedulerReport> out;
  int ahead = 0;
  for (const auto& entry : entries_) {
    if (wanted.count(entry->key) > 0) out[entry->key] = ReportOf(*entry, ahead);
    ahead += entry->running ? 0 : 1;
  }
  for (const AttemptKey& key : keys) {
    if (out.count(key) > 0) continue;
    const AttemptDirectory directory = DirectoryOf(key);
    const bool was_here = directory.HasLease() || FileExists(directory.launch_error_path());
    out[key].state = was_here ? SchedulerState::kEnded : SchedulerState::kAbsent;
  }
  return out;
}

SchedulerReport ProcessScheduler::ReportOf(const Entry& entry, int ahead) const {
  SchedulerReport report{.state = SchedulerState::kPending, .id = entry.id, .reason = entry.note};
  if (entry.running) {
    report.state = entry.note.empty() ? SchedulerState::kRunning : SchedulerState::kUnknown;
  } else if (entry.note.empty()) {
    // A long queue in round numbers, so that each job's start is not news for all the others.
    int shown = ahead;
    for (int power = 10; power <= 100'000; power *= 10) {
      if (ahead >= power) shown = power;
    }
    report.reason = absl::StrCat("waits for ", entry.slots, " of ", options_.slots, " slots",
                                 ahead == 0      ? ", next in line"
                                 : ahead == 1    ? ", 1 job ahead"
                                 : ahead < 10    ? absl::StrCat(", ", ahead, " jobs ahead")
                                                 : absl::StrCat(", at least ", shown, " jobs ahead"));
  }
  return report;
}

void ProcessScheduler::Watch(Entry& entry) {
  if (!pidfds_work_ || entry.process.pid <= 0) return;
  entry.pidfd = FileDescriptor(static_cast<int>(syscall(SYS_pidfd_open, entry.process.pid, 0)));
  if (!entry.pidfd.valid()) {
    pidfds_work_ = errno != ENOSYS && errno != EPERM;
    return;
  }
  // Level-triggered: readable until the entry is gone.
  epoll_event event{.events = EPOLLIN, .data = {}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, entry.pidfd.get(), &event);
}

void ProcessScheduler::Advance() {
  uint64_t expirations;
  (void)!read(timer_.get(), &expirations, sizeof expirations);
  const absl::Time now = clock_->Now();
  for (auto it = entries_.begin(); it != entries_.end();) {
    Entry& entry = **it;
    if (entry.running && now >= entry.kill_time) {
      log::Warn("attempt {}: did not end in time and is killed", entry.key.text());
      if (entry.child) entry.child->Kill(SIGKILL);
      else if (IsAlive(entry.process)) kill(entry.process.pid, SIGKILL);
      entry.kill_time = now + absl::Seconds(1);
    }
    if (entry.running && Ended(entry)) {
      Finalize(entry);
      it = entries_.erase(it);
    } else {
      ++it;
    }
  }
  StartPending();
  ArmTimer();
}

// Whether nobody runs the attempt any more.
bool ProcessScheduler::Ended(Entry& entry) {
  if (entry.child ? !entry.child->Poll().has_value() : IsAlive(entry.process)) return false;
  // Another copy may hold the lease: one that was started just before we were killed.
  const AttemptDirectory directory = DirectoryOf(entry.key);
  const std::optional<LeaseOwner> owner = ReadLease(directory);
  if (owner && RunsElsewhere(*owner) && !ReadLifecycle(directory.lifecycle_path()).exited) {
    entry.note = absl::StrCat("it was started on ", owner->host, ", where this agent cannot look; start the agent there,"
                              " or cancel the job");
    return directory.IsCancelled();
  }
  if (owner && owner->process != entry.process && IsAlive(owner->process)) {
    entry.child.reset();
    entry.process = owner->process;
    Watch(entry);
    return false;
  }
  return true;
}

void ProcessScheduler::Finalize(Entry& entry) {
  const AttemptDirectory directory = DirectoryOf(entry.key);
  const std::optional<LeaseOwner> owner = ReadLease(directory);
  if (owner && !ReadLifecycle(directory.lifecycle_path()).exited) {
    // The script was killed, so nobody has ended what it started.
    log::Warn("attempt {}: its script is gone without an exit record", entry.key.text());
    const std::optional<ProcessIdentity> program = ReadProgram(directory);
    // A session's number is given again only when nobody is left in it; a new leader shows by its start.
    const bool session_is_its = program && program->boot_id == IdentityOf(0).boot_id &&
                                (IsAlive(*program) || IdentityOf(program->pid).start_ticks == 0 ||
                                 IdentityOf(program->pid).start_ticks == program->start_ticks);
    const std::string mark = absl::StrCat("ITWIN_LEASE=", owner->nonce.empty() ? "-" : owner->nonce);
    if (!KillAll([&] { return ProcessesMarked(mark, session_is_its ? program->pid : 0); }, kCleanupLimit)) {
      log::Error("attempt {}: some of its processes could not be killed", entry.key.text());
    }
  }
  if (!owner && directory.HasRequest() && !directory.IsCancelled()) {
    const ExitStatus exit = entry.child ? entry.child->Poll().value_or(ExitStatus{}) : ExitStatus{};
    const std::string words =
        !entry.note.empty() ? entry.note
        : exit.signal != 0  ? absl::StrCat("the script was killed by signal ", exit.signal, " before it had begun")
                            : absl::StrCat("the script ended with code ", exit.exit_code, " before it had begun: ",
                                           LastWords(directory));
    if (absl::Status written = WriteFileAtomically(directory.launch_error_path(), words); !written.ok()) {
      log::Error("attempt {}: {}", entry.key.text(), std::string(written.message()));
    }
  }
  FaultPoint("scheduler.before_forget");
  unlink(entry.queue_path.c_str());
  FaultPoint("scheduler.after_forget");
}

// Strictly in order: a large job at the head is not starved by small ones behind it.
void ProcessScheduler::StartPending() {
  int free = options_.slots - SlotsInUse();
  for (size_t i = 0; i < entries_.size();) {
    Entry& entry = *entries_[i];
    if (entry.running) {
      ++i;
      continue;
    }
    const AttemptDirectory directory = DirectoryOf(entry.key);
    if (directory.IsCancelled() || !directory.HasRequest()) {  // cancelled while we were away, or removed
      unlink(entry.queue_path.c_str());
      entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(i));
      continue;
    }
    if (entry.slots > free && entry.slots <= options_.slots) return;
    if (clock_->Now() < entry.retry_time) return;
    if (entry.slots > options_.slots) {
      entry.note = absl::StrCat("it needs ", entry.slots, " slots, but the agent was restarted with ", options_.slots);
      return;
    }
    Start(entry);
    if (entry.running) {
      free -= entry.slots;
      ++i;
    } else if (clock_->Now() < entry.retry_time) {
      return;
    } else {
      Finalize(entry);
      entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

void ProcessScheduler::Start(Entry& entry) {
  const AttemptDirectory directory = DirectoryOf(entry.key);
  FaultPoint("scheduler.before_start");
  SubprocessOptions options;
  options.argv = {"/bin/sh", directory.script_path()};
  options.directory = directory.path();
  options.env = {{"ITWIN_SCHEDULER_ID", entry.id}};
  options.new_session = true;
  const auto start = [&]() -> absl::StatusOr<Subprocess> {
    ITWIN_ASSIGN_OR_RETURN(const FileDescriptor log_file,
                           OpenFile(directory.script_log_path(), O_WRONLY | O_CREAT | O_APPEND));
    options.stdout_fd = options.stderr_fd = log_file.get();
    return Subprocess::Start(options);
  };
  absl::StatusOr<Subprocess> child = start();
  FaultPoint("scheduler.after_start");
  if (!child.ok()) {
    entry.note = absl::StrCat("the script could not be started: ", child.status().message());
    // No room for a file or a process passes; anything else will not.
    if (absl::IsResourceExhausted(child.status()) || absl::IsUnavailable(child.status())) {
      entry.retry_time = clock_->Now() + kRetryStart;
    }
    return;
  }
  entry.note.clear();
  entry.running = true;
  entry.child = *std::move(child);
  entry.process = IdentityOf(entry.child->pid());
  Watch(entry);
  log::Info("attempt {}: started with {} of {} slots", entry.key.text(), entry.slots, options_.slots);
}

// From any thread: nothing of the queue is touched.
void ProcessScheduler::Diagnose(const v1::DiagnoseRequest&, const std::function<bool(const v1::CheckResult&)>& emit) {
  v1::CheckResult result;
  result.set_name("scheduler");
  result.set_verdict(v1::CHECK_VERDICT_OK);
  result.set_found(absl::StrCat("jobs run on this machine itself, at most ", options_.slots, " ranks at once"));
  emit(result);
}

void ProcessScheduler::ArmTimer() {
  absl::Time next = absl::InfiniteFuture();
  const absl::Time now = clock_->Now();
  for (const auto& entry : entries_) {
    if (entry->running) {
      next = std::min(next, entry->kill_time);
      if (!entry->pidfd.valid() && entry->note.empty()) next = std::min(next, now + kPollWithoutPidfd);
    } else if (entry->retry_time > now) {
      next = std::min(next, entry->retry_time);
    }
  }
  itimerspec spec{};
  if (next != absl::InfiniteFuture()) {
    spec.it_value = absl::ToTimespec(std::max(next - now, absl::Milliseconds(1)));
  }
  timerfd_settime(timer_.get(), 0, &spec, nullptr);
}

}  // namespace itwin::agent

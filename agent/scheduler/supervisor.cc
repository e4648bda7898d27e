#include "agent/scheduler/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "agent/scheduler/bounded_log.h"
#include "agent/scheduler/lease.h"
#include "agent/scheduler/oom_counter.h"
#include "agent/scheduler/process_tree.h"
#include "agent/spool/fault_point.h"
#include "agent/spool/lifecycle.h"
#include "agent/spool/spool_files.h"
#include "common/files.h"
#include "common/ids.h"
#include "common/log.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "common/subprocess.h"

namespace itwin::agent {
namespace {

using nlohmann::json;

constexpr int64_t kDefaultLogLimit = int64_t{64} << 20;
constexpr int kPipeBytes = 1 << 20;
// The sign of life, for an agent that can see neither us nor the scheduler's word.
constexpr absl::Duration kBeatInterval = absl::Seconds(10);
// Of the scheduler's wall limit, kept for ending in our own way: the grace, and this to write the last records.
constexpr absl::Duration kLimitMargin = absl::Seconds(5);
// After the program has ended: for what it left behind to obey a SIGTERM, and for its last output to arrive.
constexpr absl::Duration kOrphanGrace = absl::Seconds(1);
constexpr absl::Duration kKillLimit = absl::Seconds(10);
constexpr absl::Duration kDroppedInterval = absl::Seconds(2);

std::string Dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }

std::string EnvironmentValue(const char* name) {
  const char* value = getenv(name);
  return value == nullptr ? "" : value;
}

int64_t EnvironmentNumber(const char* name) {
  int64_t value = 0;
  return absl::SimpleAtoi(EnvironmentValue(name), &value) ? value : 0;
}

// One run of one attempt. Straight through, in the order of the methods.
class AttemptRun {
 public:
  AttemptRun(const AttemptDirectory& directory, const LaunchOptions& options) : directory_(directory), options_(options) {
    // A scheduler that kills what does not obey in time leaves us less than we would take.
    if (const int64_t wait = EnvironmentNumber("ITWIN_KILL_WAIT"); wait > 0) {
      options_.grace = std::min(options_.grace, std::max(absl::Seconds(wait) / 2, absl::Seconds(wait - 3)));
    }
  }

  int Run() {
    if (absl::Status ready = Prepare(); !ready.ok()) {
      log::Error("attempt {}: {}", directory_.key().text(), std::string(ready.message()));
      return 1;
    }
    const absl::StatusOr<bool> mine = TakeLease(directory_, owner_);
    if (!mine.ok()) {
      log::Error("attempt {}: cannot take the lease: {}", directory_.key().text(), std::string(mine.status().message()));
      return 1;
    }
    if (!*mine) {
      log::Warn("attempt {} was started before; this copy leaves", directory_.key().text());
      AppendLine(directory_.lifecycle_path(), RenderDuplicate(absl::Now(), owner_.host)).IgnoreError();
      return 0;
    }
    // Lease first, then this look: a cancel that misses our lease is seen here, and one that comes later signals us.
    if (directory_.IsCancelled()) {
      exit_.cause = kCauseCancelled;
      exit_.message = "cancelled before it began";
      return Finish();
    }
    if (absl::Status started = Launch(); !started.ok()) {
      exit_.cause = kCauseLaunchFailed;
      exit_.exit_code = 127;
      exit_.message = std::string(started.message());
      return Finish();
    }
    Watch();
    LearnWhoEndedIt();
    EndOrphans();
    return Finish();
  }

 private:
  absl::Status Prepare() {
    // First of all, so that a cancel between exec and here waits instead of ending us without a record.
    sigset_t set;
    sigemptyset(&set);
    for (int s : {SIGTERM, SIGINT, SIGHUP, SIGCHLD, SIGUSR1, SIGUSR2}) sigaddset(&set, s);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    signal(SIGPIPE, SIG_IGN);
    signals_ = FileDescriptor(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    if (!signals_.valid()) return ErrnoStatus(errno, "signalfd");
    // Whatever the program leaves behind becomes our child, so nothing escapes.
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    ITWIN_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(directory_.request_path()));
    if (!request_.ParseFromString(bytes)) {
      return absl::DataLossError(absl::StrCat(directory_.request_path(), " cannot be read as a request"));
    }
    owner_ = {.nonce = RandomHex(16), .host = HostName(), .scheduler_id = EnvironmentValue("SLURM_JOB_ID"),
              .process = IdentityOf(0)};
    if (owner_.scheduler_id.empty()) owner_.scheduler_id = EnvironmentValue("ITWIN_SCHEDULER_ID");
    owner_.restart = static_cast<int>(EnvironmentNumber("SLURM_RESTART_COUNT"));
    return absl::OkStatus();
  }

  absl::Status Launch() {
    const absl::Time start = absl::Now();
    if (request_.has_time() && (request_.time().seconds() > 0 || request_.time().nanos() > 0)) {
      deadline_ = start + absl::Seconds(request_.time().seconds()) + absl::Nanoseconds(request_.time().nanos());
    }
    // The scheduler's own limit comes with a signal that cannot be caught: ours is before that.
    if (const absl::Duration granted = absl::Seconds(EnvironmentNumber("ITWIN_GRANTED_SECONDS")); granted > absl::ZeroDuration()) {
      deadline_ = std::min(deadline_, start + granted - std::min(options_.grace + kLimitMargin, granted / 4));
    }
    for (const char* name : {"ITWIN_KILL_WAIT", "ITWIN_GRANTED_SECONDS"}) unsetenv(name);
    Beat(start);
    ITWIN_RETURN_IF_ERROR(AppendLine(
        directory_.lifecycle_path(),
        RenderStarted({.time = start, .host = owner_.host, .pid = getpid(), .scheduler_id = owner_.scheduler_id})));
    FaultPoint("script.started");
    ITWIN_ASSIGN_OR_RETURN(SubprocessOptions launch, LaunchOptionsForProgram());
    const int64_t limit = request_.log_limit_bytes() > 0 ? request_.log_limit_bytes() : kDefaultLogLimit;
    ITWIN_RETURN_IF_ERROR(logs_[0].Open(directory_.stdout_path(), limit));
    ITWIN_RETURN_IF_ERROR(logs_[1].Open(directory_.stderr_path(), limit));
    FileDescriptor ends[2];
    for (int i = 0; i < 2; ++i) {
      int fds[2];
      if (pipe2(fds, O_CLOEXEC) != 0) return ErrnoStatus(errno, "pipe");
      pipes_[i] = FileDescriptor(fds[0]);
      ends[i] = FileDescriptor(fds[1]);
      fcntl(fds[0], F_SETFL, O_NONBLOCK);
      fcntl(fds[0], F_SETPIPE_SZ, kPipeBytes);  // fewer switches for a talkative program; may be refused
    }
    launch.stdout_fd = ends[0].get();
    launch.stderr_fd = ends[1].get();
    launch.new_session = true;
    launch.die_with_parent = true;  // nothing may write on once we are gone and the attempt counts as lost
    oom_before_ = oom_.Read();
    ITWIN_ASSIGN_OR_RETURN(const Subprocess child, Subprocess::Start(launch));
    program_ = child.pid();
    FaultPoint("script.launched");
    if (absl::Status recorded = RecordProgram(directory_, IdentityOf(program_)); !recorded.ok()) {
      log::Warn("attempt {}: {}", directory_.key().text(), std::string(recorded.message()));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<SubprocessOptions> LaunchOptionsForProgram() {
    SubprocessOptions out;
    ITWIN_ASSIGN_OR_RETURN(out.argv, LaunchCommand(directory_, request_, options_));
    out.directory = directory_.work_path();
    const std::map<std::string, std::string> env =
        LaunchEnvironment(directory_, request_, owner_.nonce, deadline_);
    out.env.assign(env.begin(), env.end());
    // The program is looked up where it will run, with the PATH it will have.
    if (const auto path = env.find("PATH"); path != env.end()) setenv("PATH", path->second.c_str(), 1);
    const std::string path = EnvironmentValue("PATH");
    ITWIN_RETURN_IF_ERROR(CheckProgram(out.argv[0], out.directory, path));
    // Behind a prologue or inside a container the program may be one that is not there now.
    if (request_.launch().prologue_size() > 0 || !request_.launch().container().empty()) return out;
    const std::string inner = request_.train() ? WorkerOf(request_, options_) : request_.argv(0);
    if (inner != out.argv[0]) ITWIN_RETURN_IF_ERROR(CheckProgram(inner, out.directory, path));
    return out;
  }

  // Until the program itself has ended.
  void Watch() {
    while (!reaped_) {
      const absl::Time now = absl::Now();
      if (now >= deadline_ && term_sent_ == absl::InfiniteFuture()) {
        EndProgram(kCauseTimeLimit, absl::StrCat("the wall limit of ", absl::FormatDuration(WallLimit()), " was over"));
      }
      if (now >= term_sent_ + options_.grace && !killed_) {
        killed_ = true;
        KillAll([] { return DescendantsOf(getpid()); }, absl::ZeroDuration());
      }
      absl::Time wake = absl::InfiniteFuture();
      if (term_sent_ == absl::InfiniteFuture()) wake = deadline_;
      else wake = killed_ ? now + absl::Milliseconds(50) : term_sent_ + options_.grace;
      if (killed_) KillAll([] { return DescendantsOf(getpid()); }, absl::ZeroDuration());
      Beat(now);
      Pump(std::min(wake, next_beat_));
      Reap();
    }
  }

  absl::Duration WallLimit() const {
    return absl::Seconds(request_.time().seconds()) + absl::Nanoseconds(request_.time().nanos());
  }

  // Not fsynced, and no harm when it fails: it only has to differ for whoever looks from another host.
  void Beat(absl::Time now) {
    if (now < next_beat_) return;
    next_beat_ = now + kBeatInterval;
    const absl::StatusOr<FileDescriptor> file = OpenFile(directory_.beat_path(), O_WRONLY | O_CREAT);
    if (file.ok()) WriteAll(file->get(), absl::StrFormat("%010d\n", ++beats_), directory_.beat_path()).IgnoreError();
  }

  // Waits for output and signals; moves output into the logs.
  void Pump(absl::Time wake) {
    const absl::Duration left = wake - absl::Now();
    int ms = left > absl::Hours(1) ? 3'600'000
                                   : static_cast<int>(absl::ToInt64Milliseconds(absl::Ceil(
                                         std::max(left, absl::ZeroDuration()), absl::Milliseconds(1))));
    if (logs_[0].dropped() + logs_[1].dropped() != recorded_dropped_) {
      ms = std::min(ms, static_cast<int>(absl::ToInt64Milliseconds(kDroppedInterval)));
    }
    pollfd entries[3] = {{signals_.get(), POLLIN, 0}, {pipes_[0].get(), POLLIN, 0}, {pipes_[1].get(), POLLIN, 0}};
    poll(entries, 3, ms);
    for (int i = 0; i < 2; ++i) {
      if (entries[i + 1].revents == 0) continue;
      const ssize_t got = read(pipes_[i].get(), buffer_.data(), buffer_.size());
      if (got > 0) {
        logs_[i].Write(absl::string_view(buffer_.data(), static_cast<size_t>(got)));
      } else if (got == 0) {
        pipes_[i].Reset();  // poll ignores negative descriptors
      }
    }
    if (entries[0].revents != 0) TakeSignals();
    RecordDropped(/*now=*/false);
  }

  void TakeSignals() {
    signalfd_siginfo info;
    while (read(signals_.get(), &info, sizeof info) == sizeof info) {
      const int number = static_cast<int>(info.ssi_signo);
      if (number == SIGCHLD) continue;
      if (number == SIGUSR1 || number == SIGUSR2) {
        WriteFileAtomically(directory_.stop_path(), "").IgnoreError();  // the deadline is the second way
        continue;
      }
      if (directory_.IsCancelled()) {
        EndProgram(kCauseCancelled, "cancelled");
      } else {
        EndProgram(kCauseTerminated, absl::StrCat("ended from outside by signal ", number));
      }
    }
  }

  void EndProgram(const char* cause, std::string message) {
    if (term_sent_ != absl::InfiniteFuture()) return;
    term_sent_ = absl::Now();
    exit_.cause = cause;
    exit_.message = std::move(message);
    if (reaped_) return;
    kill(-program_, SIGTERM);
    kill(-program_, SIGCONT);
  }

  // A scheduler may signal every process of the attempt at once, and the program be gone before we have heard of it.
  void LearnWhoEndedIt() {
    const int fatal = exit_.signal != 0 ? exit_.signal : exit_.exit_code - 128;
    if (exit_.cause != kCauseSelf || (fatal != SIGTERM && fatal != SIGINT && fatal != SIGHUP && fatal != SIGKILL)) return;
    const absl::Time limit = absl::Now() + kOrphanGrace;
    while (term_sent_ == absl::InfiniteFuture() && absl::Now() < limit) Pump(absl::Now() + absl::Milliseconds(20));
    if (term_sent_ == absl::InfiniteFuture() && directory_.IsCancelled()) EndProgram(kCauseCancelled, "cancelled");
  }

  // Collects every child that ended: the program, and what was left to us.
  void Reap() {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
      if (pid != program_) continue;
      reaped_ = true;
      exit_.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
      exit_.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    }
  }

  // The program is over, so is the attempt: helpers it left in the background get a moment to obey.
  void EndOrphans() {
    std::vector<pid_t> left = DescendantsOf(getpid());
    for (pid_t pid : left) kill(pid, SIGTERM);
    const absl::Time kill_time = absl::Now() + kOrphanGrace;
    const absl::Time limit = kill_time + kKillLimit;
    while (!left.empty() || pipes_[0].valid() || pipes_[1].valid()) {
      Reap();
      left = DescendantsOf(getpid());
      const absl::Time now = absl::Now();
      if (now >= limit) break;
      if (now >= kill_time) {
        for (pid_t pid : left) kill(pid, SIGKILL);
      }
      // A pipe is still open only while somebody holds it; with nobody left, what remains in it is read and it closes.
      if (!left.empty() || pipes_[0].valid() || pipes_[1].valid()) Pump(now + absl::Milliseconds(left.empty() ? 100 : 10));
    }
    Reap();
    if (!left.empty()) log::Warn("attempt {}: {} processes could not be killed", directory_.key().text(), left.size());
  }

  void RecordDropped(bool now) {
    const int64_t total = logs_[0].dropped() + logs_[1].dropped();
    if (total == recorded_dropped_ || (!now && absl::Now() < next_dropped_record_)) return;
    next_dropped_record_ = absl::Now() + kDroppedInterval;
    const DroppedBytes dropped{.out = logs_[0].dropped(), .err = logs_[1].dropped()};
    if (WriteFileAtomically(directory_.dropped_path(), RenderDropped(dropped)).ok()) recorded_dropped_ = total;
  }

  // A command that ended well and wrote no record of its own gets one with its outputs.
  absl::Status WriteResult() {
    if (request_.train() || FileExists(directory_.result_path())) return absl::OkStatus();
    ITWIN_ASSIGN_OR_RETURN(const std::vector<SpoolFileEntry> files, ListFilesBeneath(directory_.outputs_path()));
    json outputs = json::array();
    for (const SpoolFileEntry& file : files) {
      ITWIN_ASSIGN_OR_RETURN(const std::string sum, Sha256OfFile(directory_.outputs_path() + "/" + file.path));
      outputs.push_back({{"path", file.path}, {"size", file.size_bytes}, {"sha256", sum}});
    }
    const json result = {{"format", 1}, {"attempt", directory_.key().text()}, {"outcome", "succeeded"}, {"message", ""},
                         {"metrics", json::object()}, {"outputs", outputs}, {"info", json::object()},
                         {"t", UnixSeconds(absl::Now())}};
    return WriteFileAtomically(directory_.result_path(), Dump(result) + "\n");
  }

  // Killed, not by us, and the kernel has killed for lack of memory since it began. mpirun and shells tell the
  // signal of a rank as 128 + signal.
  void SayIfOutOfMemory() {
    const bool killed = exit_.signal == SIGKILL || (exit_.signal == 0 && exit_.exit_code == 128 + SIGKILL);
    if (!reaped_ || !killed || term_sent_ != absl::InfiniteFuture()) return;
    const int64_t kills = oom_.Read() - oom_before_;
    if (kills <= 0) return;
    exit_.cause = kCauseOutOfMemory;
    exit_.message = absl::StrCat("out of memory: the kernel killed ", kills, kills == 1 ? " process" : " processes",
                                 oom_.of_group() ? " of its control group" : " of this machine",
                                 " for lack of memory; ask for more memory, or use less (smaller batch, fewer ranks per node)");
  }

  int Finish() {
    RecordDropped(/*now=*/true);
    // The room kept back is for what follows.
    unlink(directory_.reserve_path().c_str());
    // A program that obeyed and ended well, or saved itself, has ended by itself: done wins over a late cancel.
    if (reaped_ && exit_.signal == 0 && (exit_.exit_code == 0 || exit_.exit_code == 85)) {
      exit_.cause = kCauseSelf;
      exit_.message.clear();
    }
    SayIfOutOfMemory();
    if (reaped_ && exit_.signal == 0 && exit_.exit_code == 0) {
      if (absl::Status written = WriteResult(); !written.ok()) {
        log::Error("attempt {}: {}", directory_.key().text(), std::string(written.message()));
        exit_.message = absl::StrCat("the result record could not be written: ", std::string(written.message()));
      }
    }
    FaultPoint("script.before_exited");
    rusage usage{};
    getrusage(RUSAGE_CHILDREN, &usage);
    exit_.cpu_seconds = static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                        static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
    exit_.max_rss_bytes = int64_t{usage.ru_maxrss} * 1024;
    exit_.time = absl::Now();
    // Hours of work may hang on this line, so a disk that is full now is given time to be emptied.
    for (int tries = 0; tries < 60; ++tries) {
      const absl::Status written = AppendLine(directory_.lifecycle_path(), RenderExited(exit_));
      if (written.ok()) break;
      log::Error("attempt {}: cannot record the end: {}", directory_.key().text(), std::string(written.message()));
      poll(nullptr, 0, 1000);
    }
    FaultPoint("script.after_exited");
    return exit_.signal != 0 ? 128 + exit_.signal : exit_.exit_code;
  }

  const AttemptDirectory directory_;
  LaunchOptions options_;
  v1::StartAttemptRequest request_;
  LeaseOwner owner_;
  FileDescriptor signals_;
  FileDescriptor pipes_[2];
  BoundedLog logs_[2];
  std::string buffer_ = std::string(256 << 10, '\0');
  int64_t recorded_dropped_ = 0;
  absl::Time next_dropped_record_ = absl::InfinitePast();
  absl::Time next_beat_ = absl::InfinitePast();
  int beats_ = 0;
  absl::Time deadline_ = absl::InfiniteFuture();
  absl::Time term_sent_ = absl::InfiniteFuture();
  bool killed_ = false;
  const OomCounter oom_;
  int64_t oom_before_ = 0;
  pid_t program_ = 0;
  bool reaped_ = false;
  ExitedRecord exit_;
};

}  // namespace

int RunAttempt(const AttemptDirectory& directory, const LaunchOptions& options) {
  return AttemptRun(directory, options).Run();
}

}  // namespace itwin::agent

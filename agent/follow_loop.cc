#include "agent/follow_loop.h"

#include <limits.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "agent/scheduler/verdict.h"
#include "agent/spool/fault_point.h"
#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

constexpr absl::Duration kMinPoll = absl::Milliseconds(5);
// Attempts looked at in a second when nothing happens at all: bounds the idle load whatever their number.
constexpr int kIdleLooksPerSecond = 200;
constexpr int kLooksPerSecond = 2000;  // and when all of them write
// Small appends are sent together: at most this many responses a second per follower.
constexpr absl::Duration kCoalesce = absl::Milliseconds(4);
// inotify is not read more often than this, so that a program writing all the time cannot make us spin.
constexpr absl::Duration kInotifyPause = absl::Milliseconds(2);
constexpr int64_t kResponseBytes = 1 << 20;
// One attempt's turn in a response, so that a talkative one does not hold up the others.
constexpr int64_t kTurnBytes = 256 << 10;
constexpr int kMaxStatusesInResponse = 1000;
constexpr int kMaxNodeFiles = 10'000;
constexpr int64_t kMaxResultBytes = 1 << 20;

int64_t SizeOf(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) ? info.st_size : 0;
}

// Files whose growth says nothing about the attempt's state.
bool IsStreamFile(absl::string_view name) {
  return name == "metrics.jsonl" || name == "stdout.log" || name == "stderr.log" ||
         HostOfNodeFile(std::string(name)).has_value();
}

bool HasLines(v1::SpoolFile kind) { return kind == v1::SPOOL_FILE_METRICS || kind == v1::SPOOL_FILE_NODE; }

int64_t CursorOf(const v1::SpoolCursor& cursor, v1::SpoolFile kind, const std::string& host) {
  int64_t offset = 0;
  if (kind == v1::SPOOL_FILE_METRICS) offset = cursor.metrics();
  if (kind == v1::SPOOL_FILE_STDOUT) offset = cursor.stdout_log();
  if (kind == v1::SPOOL_FILE_STDERR) offset = cursor.stderr_log();
  if (kind == v1::SPOOL_FILE_NODE) {
    const auto it = cursor.nodes().find(host);
    if (it != cursor.nodes().end()) offset = it->second;
  }
  return std::max<int64_t>(0, offset);
}

}  // namespace

bool IsSharedFileSystem(const std::string& path) {
  struct statfs info;
  if (statfs(path.c_str(), &info) != 0) return true;
  switch (static_cast<unsigned>(info.f_type)) {
    case 0xEF53:      // ext2/3/4
    case 0x58465342:  // xfs
    case 0x9123683E:  // btrfs
    case 0x01021994:  // tmpfs
    case 0x794c7630:  // overlayfs
    case 0x2FC12FC1:  // zfs
    case 0xF2F52010:  // f2fs
    case 0x858458f6:  // ramfs
      return false;
    default:
      return true;
  }
}

FollowLoop::FollowLoop(Options options) : options_(std::move(options)) {
  if (options_.use_inotify) inotify_ = FileDescriptor(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
}

FollowLoop::~FollowLoop() { Stop(); }

void FollowLoop::Start() { thread_ = std::thread([this] { Run(); }); }

void FollowLoop::Stop() {
  if (!thread_.joinable()) return;
  mailbox_.Post([this] { stopping_ = true; });
  thread_.join();
  mailbox_.Close();
}

void FollowLoop::Run() {
  absl::Time inotify_after = absl::InfinitePast();
  while (!stopping_) {
    absl::Time now = absl::Now();
    absl::Time wake = Tick(now);
    const bool inotify_paused = now < inotify_after;
    if (inotify_paused) wake = std::min(wake, inotify_after);
    const absl::Duration left = std::max(wake - absl::Now(), absl::ZeroDuration());
    const timespec limit = absl::ToTimespec(std::min(left, absl::Hours(1)));
    pollfd entries[2] = {{mailbox_.fd(), POLLIN, 0}, {inotify_paused ? -1 : inotify_.get(), POLLIN, 0}};
    ppoll(entries, 2, &limit, nullptr);
    if (entries[0].revents != 0) mailbox_.RunPosted();
    if (entries[1].revents != 0) {
      now = absl::Now();
      TakeInotifyEvents(now);
      inotify_after = now + kInotifyPause;
    }
  }
}

absl::Time FollowLoop::Tick(absl::Time now) {
  while (!polls_.empty() && polls_.begin()->first <= now) {
    const auto it = views_.find(polls_.begin()->second);
    ITWIN_CHECK(it != views_.end());
    Refresh(*it->second, /*all=*/false, now);
  }
  absl::Time wake = polls_.empty() ? absl::InfiniteFuture() : polls_.begin()->first;
  for (auto& [id, session] : sessions_) wake = std::min(wake, Pump(session, now));
  return wake;
}

// ---- attempts ----

FollowLoop::View& FollowLoop::ViewOf(const AttemptKey& key) {
  std::unique_ptr<View>& view = views_[key];
  if (view != nullptr) return *view;
  view = std::make_unique<View>(AttemptDirectory(options_.root, key));
  view->report.state = SchedulerState::kUnknown;
  view->files = {{v1::SPOOL_FILE_METRICS, "", view->directory.metrics_path()},
                 {v1::SPOOL_FILE_STDOUT, "", view->directory.stdout_path()},
                 {v1::SPOOL_FILE_STDERR, "", view->directory.stderr_path()}};
  view->status.set_attempt(key.text());
  view->status.set_phase(v1::ATTEMPT_PHASE_ABSENT);
  // What was once concluded stays.
  if (const absl::StatusOr<std::string> bytes = ReadFile(view->directory.ended_path()); bytes.ok()) {
    v1::AttemptStatus status;
    if (status.ParseFromString(*bytes) && status.phase() == v1::ATTEMPT_PHASE_ENDED) {
      view->status = std::move(status);
      view->ended = true;
      ++view->version;
    }
  }
  return *view;
}

std::vector<AttemptKey> FollowLoop::Keys() const {
  std::vector<AttemptKey> out;
  for (const auto& [key, view] : views_) {
    if (view->status.phase() != v1::ATTEMPT_PHASE_ABSENT) out.push_back(key);
  }
  return out;
}

void FollowLoop::Report(const AttemptKey& key, const SchedulerReport& report) {
  View& view = ViewOf(key);
  if (view.ended || (view.next_poll != absl::InfiniteFuture() && view.report == report)) return;
  view.report = report;
  WatchDirectory(view);
  Refresh(view, /*all=*/true, absl::Now());
}

void FollowLoop::Forget(const AttemptKey& key) {
  const auto it = views_.find(key);
  if (it == views_.end()) return;
  Unwatch(*it->second);
  Schedule(*it->second, absl::InfiniteFuture());
  const int followers = it->second->followers;
  views_.erase(it);
  if (followers == 0) return;
  View& fresh = ViewOf(key);
  fresh.followers = followers;
  fresh.version = 1;  // ABSENT is news to them
  for (auto& [id, session] : sessions_) {
    const auto followed = session.followed.find(key);
    if (followed == session.followed.end()) continue;
    followed->second.version = -1;
    followed->second.positions.clear();
    Enqueue(session, key);
  }
}

v1::AttemptStatus FollowLoop::Status(const AttemptKey& key, bool with_result) {
  const bool known = views_.count(key) > 0;
  View& view = ViewOf(key);
  if (!view.ended) Refresh(view, /*all=*/true, absl::Now());
  v1::AttemptStatus out = view.status;
  if (with_result && view.ended) LoadResult(view, &out);
  // Asking for keys that never existed must not fill the memory.
  if (!known && out.phase() == v1::ATTEMPT_PHASE_ABSENT && view.followers == 0) Forget(key);
  return out;
}

void FollowLoop::LoadResult(const View& view, v1::AttemptStatus* status) const {
  absl::StatusOr<std::string> text = ReadFile(view.directory.result_path(), kMaxResultBytes);
  if (text.ok() && IsValidUtf8(*text)) status->set_result_json(*std::move(text));
}

void FollowLoop::Refresh(View& view, bool all, absl::Time now) {
  if (view.ended) {
    Schedule(view, absl::InfiniteFuture());
    return;
  }
  const int64_t before = view.version;
  // A look in passing is a handful of system calls: there may be thousands of attempts, and the file system shared.
  const int64_t lifecycle_size = SizeOf(view.directory.lifecycle_path());
  bool news = false;
  if (lifecycle_size > 0) {
    RefreshNodeFiles(view);
    news = RefreshSizes(view);
    if (!view.checkpoint && !all && view.directory.HasCheckpoint()) all = true;
  }
  if (view.exit_seen != absl::InfiniteFuture() && now - view.exit_seen >= options_.await_scheduler) all = true;
  if (all || lifecycle_size != view.lifecycle_size) {
    view.lifecycle_size = lifecycle_size;
    RefreshStatus(view);
  }
  news |= view.version != before;
  if (news) NotifyFollowers(view);
  if (view.ended || view.status.phase() == v1::ATTEMPT_PHASE_ABSENT) {
    Schedule(view, absl::InfiniteFuture());
    return;
  }
  // With inotify the looks are only a safety net; without, they follow the activity.
  const double attempts = static_cast<double>(polls_.size());
  const absl::Duration calm = std::max(options_.max_poll, absl::Seconds(attempts / kIdleLooksPerSecond));
  const absl::Duration busy = std::max(kMinPoll, absl::Seconds(attempts / kLooksPerSecond));
  if (view.watch >= 0) {
    view.poll = calm;
  } else {
    view.poll = news ? busy : std::clamp(view.poll * 2, busy, calm);
  }
  Schedule(view, now + view.poll);
}

bool FollowLoop::RefreshSizes(View& view) {
  bool changed = false;
  for (SpoolFileView& file : view.files) {
    const int64_t size = SizeOf(file.path);
    changed |= size != file.size;
    file.size = size;
  }
  return changed;
}

void FollowLoop::RefreshNodeFiles(View& view) {
  struct stat info;
  if (stat(view.directory.path().c_str(), &info) != 0) return;
  const int64_t mtime = int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
  if (mtime == view.directory_mtime_ns) return;
  // A file made in the same tick of the clock as this look would be missed; so a young directory is looked at again.
  view.directory_mtime_ns = absl::Now() - absl::TimeFromTimespec(info.st_mtim) > absl::Seconds(2) ? mtime : 0;
  std::error_code error;
  for (std::filesystem::directory_iterator it(view.directory.path(), error), end; !error && it != end;
       it.increment(error)) {
    const std::optional<std::string> host = HostOfNodeFile(it->path().filename().string());
    if (!host || !IsValidUtf8(*host) || static_cast<int>(view.files.size()) >= kMaxNodeFiles) continue;
    if (std::none_of(view.files.begin(), view.files.end(), [&](const SpoolFileView& f) { return f.host == *host; })) {
      view.files.push_back({v1::SPOOL_FILE_NODE, *host, it->path().string()});
    }
  }
}

void FollowLoop::RefreshStatus(View& view) {
  const AttemptDirectory& directory = view.directory;
  Evidence evidence{.key = directory.key()};
  struct stat info;
  evidence.requested = stat(directory.request_path().c_str(), &info) == 0;
  if (evidence.requested) evidence.submitted = absl::TimeFromTimespec(info.st_mtim);
  evidence.lease = directory.HasLease();
  evidence.cancelled = directory.IsCancelled();
  if (evidence.cancelled) evidence.cancel_reason = ReadFile(directory.cancelled_path(), 4096).value_or("");
  if (FileExists(directory.launch_error_path())) {
    evidence.launch_error = ReadFile(directory.launch_error_path(), 1 << 16).value_or("");
  }
  if (evidence.lease) evidence.lifecycle = ReadLifecycle(directory.lifecycle_path());
  evidence.report = view.report;
  if (evidence.lifecycle.exited && options_.await_scheduler > absl::ZeroDuration()) {
    evidence.await_scheduler =
        view.exit_seen == absl::InfiniteFuture() || absl::Now() - view.exit_seen < options_.await_scheduler;
  }
  v1::AttemptStatus status = Conclude(evidence);
  if (evidence.await_scheduler && status.phase() != v1::ATTEMPT_PHASE_ENDED && view.exit_seen == absl::InfiniteFuture()) {
    view.exit_seen = absl::Now();
    options_.on_killed(directory.key());
  }
  if (!view.checkpoint && evidence.lease) view.checkpoint = directory.HasCheckpoint();
  status.set_checkpoint(view.checkpoint);
  const bool ended = status.phase() == v1::ATTEMPT_PHASE_ENDED;
  if (ended) {
    if (status.ended_us() == 0) status.set_ended_us(absl::ToUnixMicros(absl::Now()));
    view.directory_mtime_ns = 0;
    RefreshNodeFiles(view);
    RefreshSizes(view);
    for (const SpoolFileView& file : view.files) {
      const int64_t size = HasLines(file.kind) ? WholeLinesSize(file.path) : file.size;
      if (file.kind == v1::SPOOL_FILE_METRICS) status.mutable_sizes()->set_metrics(size);
      if (file.kind == v1::SPOOL_FILE_STDOUT) status.mutable_sizes()->set_stdout_log(size);
      if (file.kind == v1::SPOOL_FILE_STDERR) status.mutable_sizes()->set_stderr_log(size);
      if (file.kind == v1::SPOOL_FILE_NODE) (*status.mutable_sizes()->mutable_nodes())[file.host] = size;
    }
    const DroppedBytes dropped = ReadDropped(directory.dropped_path());
    status.mutable_sizes()->set_stdout_dropped(dropped.out);
    status.mutable_sizes()->set_stderr_dropped(dropped.err);
  }
  const std::string bytes = status.SerializeAsString();
  if (bytes == view.status.SerializeAsString()) return;
  view.status = std::move(status);
  ++view.version;
  if (!ended) return;
  view.ended = true;
  FaultPoint("loop.before_ended");
  // Only a shortcut for the next start and a promise not to change our mind: without space the evidence stays.
  absl::Status written = options_.may_act();
  if (written.ok()) written = WriteFileAtomically(directory.ended_path(), bytes);
  if (!written.ok()) {
    log::Warn("attempt {}: {}", directory.key().text(), std::string(written.message()));
  }
  FaultPoint("loop.after_ended");
  Unwatch(view);
  log::Info("attempt {}: {} ({})", directory.key().text(), v1::EndCause_Name(view.status.cause()), view.status.reason());
  options_.on_ended(directory.key());
}

void FollowLoop::Schedule(View& view, absl::Time time) {
  const AttemptKey& key = view.directory.key();
  if (view.next_poll != absl::InfiniteFuture()) polls_.erase({view.next_poll, key});
  view.next_poll = time;
  if (time != absl::InfiniteFuture()) polls_.insert({time, key});
}

// ---- inotify ----

void FollowLoop::WatchDirectory(View& view) {
  if (!inotify_.valid() || view.watch >= 0 || view.ended) return;
  // When the user's watches are used up, looking does it too.
  view.watch = inotify_add_watch(inotify_.get(), view.directory.path().c_str(),
                                 IN_MODIFY | IN_CREATE | IN_MOVED_TO | IN_ONLYDIR);
  if (view.watch >= 0) by_watch_[view.watch] = &view;
}

void FollowLoop::Unwatch(View& view) {
  if (view.watch < 0) return;
  by_watch_.erase(view.watch);
  inotify_rm_watch(inotify_.get(), view.watch);
  view.watch = -1;
}

void FollowLoop::TakeInotifyEvents(absl::Time now) {
  alignas(inotify_event) char buffer[64 << 10];
  std::map<View*, bool> touched;  // whether more than streams has changed
  bool overflow = false;
  while (true) {
    const ssize_t got = read(inotify_.get(), buffer, sizeof buffer);
    if (got <= 0) break;
    for (ssize_t at = 0; at < got;) {
      const auto* event = reinterpret_cast<const inotify_event*>(buffer + at);
      at += static_cast<ssize_t>(sizeof(inotify_event) + event->len);
      if (event->mask & IN_Q_OVERFLOW) overflow = true;
      const auto it = by_watch_.find(event->wd);
      if (it == by_watch_.end()) continue;
      if (event->mask & IN_IGNORED) {  // the directory is gone
        it->second->watch = -1;
        by_watch_.erase(it);
        continue;
      }
      if (event->mask & (IN_CREATE | IN_MOVED_TO)) it->second->directory_mtime_ns = 0;
      touched[it->second] |= event->len == 0 || !IsStreamFile(event->name);
    }
    if (static_cast<size_t>(got) < sizeof buffer / 2) break;
  }
  if (overflow) {
    for (auto& [watch, view] : by_watch_) touched[view] = true;
  }
  for (const auto& [view, all] : touched) Refresh(*view, all, now);
}

// ---- followers ----

int64_t FollowLoop::OpenSession(FollowSink* sink) {
  const int64_t id = next_session_++;
  sessions_[id].sink = sink;
  return id;
}

void FollowLoop::CloseSession(int64_t id) {
  const auto it = sessions_.find(id);
  if (it == sessions_.end()) return;
  std::vector<AttemptKey> keys;
  for (const auto& [key, followed] : it->second.followed) keys.push_back(key);
  for (const AttemptKey& key : keys) Unfollow(id, key);
  sessions_.erase(it);
}

void FollowLoop::Follow(int64_t id, const AttemptKey& key, const v1::SpoolCursor& cursor) {
  const auto it = sessions_.find(id);
  if (it == sessions_.end()) return;
  View& view = ViewOf(key);
  if (view.ended) {
    if (view.files.size() == 3) RefreshNodeFiles(view);
    RefreshSizes(view);
  }
  if (it->second.followed.count(key) == 0) ++view.followers;
  Followed& followed = it->second.followed[key];
  const bool queued = followed.queued;
  followed = Followed{.cursor = cursor, .queued = queued};
  Enqueue(it->second, key);
  if (!view.ended) Refresh(view, /*all=*/true, absl::Now());
}

void FollowLoop::Unfollow(int64_t id, const AttemptKey& key) {
  const auto it = sessions_.find(id);
  if (it == sessions_.end() || it->second.followed.erase(key) == 0) return;
  const auto view = views_.find(key);
  if (view == views_.end()) return;
  if (--view->second->followers == 0 && view->second->status.phase() == v1::ATTEMPT_PHASE_ABSENT) Forget(key);
}

void FollowLoop::Writable(int64_t id) {
  const auto it = sessions_.find(id);
  if (it != sessions_.end()) it->second.writable = true;
}

void FollowLoop::NotifyFollowers(const View& view) {
  if (view.followers == 0) return;
  for (auto& [id, session] : sessions_) {
    if (session.followed.count(view.directory.key()) > 0) Enqueue(session, view.directory.key());
  }
}

void FollowLoop::Enqueue(Session& session, const AttemptKey& key) {
  Followed& followed = session.followed[key];
  if (followed.queued) return;
  followed.queued = true;
  session.queue.push_back(key);
}

// Sends the next response if the follower takes one; says when to come back, if time is what it waits for.
absl::Time FollowLoop::Pump(Session& session, absl::Time now) {
  if (!session.writable || session.queue.empty()) return absl::InfiniteFuture();
  if (now < session.not_before) return session.not_before;
  v1::FollowResponse response;
  int64_t budget = kResponseBytes;
  while (!session.queue.empty() && budget > 0 && response.statuses_size() < kMaxStatusesInResponse) {
    const AttemptKey key = session.queue.front();
    session.queue.pop_front();
    const auto followed = session.followed.find(key);
    if (followed == session.followed.end()) continue;  // dropped meanwhile
    followed->second.queued = false;
    const int statuses = response.statuses_size(), chunks = response.chunks_size();
    const bool more = AddTo(&response, std::min(budget, kTurnBytes), ViewOf(key), followed->second);
    for (int i = statuses; i < response.statuses_size(); ++i) budget -= static_cast<int64_t>(response.statuses(i).ByteSizeLong());
    for (int i = chunks; i < response.chunks_size(); ++i) budget -= static_cast<int64_t>(response.chunks(i).ByteSizeLong());
    if (more) Enqueue(session, key);
  }
  if (response.statuses_size() == 0 && response.chunks_size() == 0) return absl::InfiniteFuture();
  session.writable = false;
  // A full response is followed at once; small ones wait for company.
  session.not_before = budget <= 0 ? now : now + kCoalesce;
  session.sink->Send(std::move(response));
  return absl::InfiniteFuture();
}

// Adds what is new of one attempt; returns whether there is more.
bool FollowLoop::AddTo(v1::FollowResponse* response, int64_t budget, View& view, Followed& followed) {
  if (followed.version != view.version) {
    followed.version = view.version;
    v1::AttemptStatus* status = response->add_statuses();
    *status = view.status;
    if (view.ended) LoadResult(view, status);
  }
  bool more = false;
  while (followed.positions.size() < view.files.size()) {
    const SpoolFileView& file = view.files[followed.positions.size()];
    followed.positions.push_back({.offset = CursorOf(followed.cursor, file.kind, file.host)});
  }
  for (size_t i = 0; i < view.files.size(); ++i) {
    const SpoolFileView& file = view.files[i];
    TailPosition& position = followed.positions[i];
    const int64_t read_to = std::max(position.offset, position.scanned);
    if (file.size == read_to || (file.size < position.offset && position.cut)) continue;
    if (budget <= 0) return true;
    absl::StatusOr<TailChunk> chunk =
        ReadTail(file.path, HasLines(file.kind), std::min(budget, kMaxChunkBytes), &position);
    if (!chunk.ok()) continue;  // looked at again with the next change or look
    more |= chunk->more;
    if (chunk->empty()) continue;
    budget -= static_cast<int64_t>(chunk->data.size());
    v1::SpoolChunk* out = response->add_chunks();
    out->set_attempt(view.directory.key().text());
    out->set_file(file.kind);
    out->set_host(file.host);
    out->set_offset(chunk->offset);
    out->set_data(std::move(chunk->data));
    out->set_note(chunk->note);
  }
  return more;
}

}  // namespace itwin::agent

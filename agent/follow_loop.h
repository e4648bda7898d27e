#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "agent/scheduler/scheduler.h"
#include "agent/spool/mailbox.h"
#include "agent/spool/tail.h"
#include "common/files.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// A follower as the loop sees it. Called by the loop's thread only.
class FollowSink {
 public:
  virtual ~FollowSink() = default;
  // One at a time: the next only after FollowLoop::Writable.
  virtual void Send(v1::FollowResponse response) = 0;
};

// The loop that knows what state every attempt is in and streams what is appended to the spools. It owns that state
// alone; others post to it. Local file systems tell by inotify what was written; shared ones do not, so there (and, at a
// low rate, everywhere) running attempts are looked at, 5 ms apart after something came, then ever more seldom. An
// attempt that has ended costs nothing.
//
// Memory is bounded: for each follower at most one response of about 1 MiB is under way; what it has not
// taken stays in the files.
class FollowLoop {
 public:
  struct Options {
    std::string root;
    bool use_inotify = true;
    absl::Duration max_poll = absl::Seconds(1);
    // Told by the loop's thread when an attempt has reached its end.
    std::function<void(const AttemptKey&)> on_ended = [](const AttemptKey&) {};
    // The scheduler knows why it killed something and is asked from time to time only: an exit record that says "killed"
    // waits this long for its word, and `on_killed` (in the loop's thread) may have it asked now. Zero: it never knows.
    absl::Duration await_scheduler = absl::ZeroDuration();
    std::function<void(const AttemptKey&)> on_killed = [](const AttemptKey&) {};
    // Asked before the end of an attempt is written into the spool; an error leaves that to somebody else.
    std::function<absl::Status()> may_act = [] { return absl::OkStatus(); };
  };

  explicit FollowLoop(Options options);
  ~FollowLoop();  // Stop()

  void Start();
  void Stop();  // idempotent

  // Thread-safe; runs `task` in the loop's thread. False after Stop().
  bool Post(std::function<void()> task) { return mailbox_.Post(std::move(task)); }

  // The rest: the loop's thread only (or any one thread before Start).

  // Takes note of an attempt and of what the scheduler says of it.
  void Report(const AttemptKey& key, const SchedulerReport& report);
  void Forget(const AttemptKey& key);  // it was removed
  // With the result record, if it has ended and `with_result`. Looks at the disk.
  v1::AttemptStatus Status(const AttemptKey& key, bool with_result);
  std::vector<AttemptKey> Keys() const;

  int64_t OpenSession(FollowSink* sink);
  void CloseSession(int64_t session);
  void Follow(int64_t session, const AttemptKey& key, const v1::SpoolCursor& cursor);
  void Unfollow(int64_t session, const AttemptKey& key);
  void Writable(int64_t session);
  int sessions() const { return static_cast<int>(sessions_.size()); }

  // Does what is due and says when there will be more to do. For tests and Run.
  absl::Time Tick(absl::Time now);

 private:
  struct SpoolFileView {
    v1::SpoolFile kind;
    std::string host;  // of a node file
    std::string path;
    int64_t size = 0;
  };
  struct View {  // of one attempt
    explicit View(AttemptDirectory d) : directory(std::move(d)) {}
    AttemptDirectory directory;
    SchedulerReport report;
    v1::AttemptStatus status;  // without result_json
    int64_t version = 0;       // grows with each change of status
    bool ended = false;
    bool checkpoint = false;
    int followers = 0;
    int watch = -1;
    std::vector<SpoolFileView> files;  // metrics, stdout, stderr, nodes
    int64_t directory_mtime_ns = 0;
    int64_t lifecycle_size = -1;
    absl::Duration poll = absl::ZeroDuration();
    absl::Time next_poll = absl::InfiniteFuture();
    absl::Time exit_seen = absl::InfiniteFuture();  // the exit record, while it waits for the scheduler's word
  };
  struct Followed {
    int64_t version = -1;  // of the status that was sent
    std::vector<TailPosition> positions = {};  // as View::files
    v1::SpoolCursor cursor = {};               // where node files that are yet to appear begin
    bool queued = false;
  };
  struct Session {
    FollowSink* sink;
    bool writable = true;
    absl::Time not_before = absl::InfinitePast();
    std::map<AttemptKey, Followed> followed;
    std::deque<AttemptKey> queue;  // with something to send, each once
  };

  void Run();
  View& ViewOf(const AttemptKey& key);
  void Refresh(View& view, bool all, absl::Time now);  // `all`: what only we or the scheduler change, too
  bool RefreshSizes(View& view);
  void RefreshNodeFiles(View& view);
  void RefreshStatus(View& view);
  void Schedule(View& view, absl::Time time);
  void WatchDirectory(View& view);
  void Unwatch(View& view);
  void TakeInotifyEvents(absl::Time now);
  void NotifyFollowers(const View& view);
  void Enqueue(Session& session, const AttemptKey& key);
  absl::Time Pump(Session& session, absl::Time now);
  bool AddTo(v1::FollowResponse* response, int64_t budget, View& view, Followed& followed);
  void LoadResult(const View& view, v1::AttemptStatus* status) const;

  const Options options_;
  Mailbox mailbox_;
  FileDescriptor inotify_;
  std::thread thread_;
  bool stopping_ = false;
  std::map<AttemptKey, std::unique_ptr<View>> views_;
  absl::flat_hash_map<int, View*> by_watch_;
  std::set<std::pair<absl::Time, AttemptKey>> polls_;
  std::map<int64_t, Session> sessions_;
  int64_t next_session_ = 1;
};

// Whether changes made by other hosts go unnoticed by inotify there (NFS, Lustre and their like).
bool IsSharedFileSystem(const std::string& path);

}  // namespace itwin::agent

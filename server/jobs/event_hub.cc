#include "server/jobs/event_hub.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace itwin::server {
namespace {

constexpr size_t kSharedUpdates = 16;                    // kept per watched job
constexpr int64_t kMaxSharedBytes = int64_t{64} << 20;  // kept of all watched jobs together

bool SameCursor(const v1::WatchCursor& a, const v1::WatchCursor& b) {
  return a.event_sequence() == b.event_sequence() && a.points() == b.points() &&
         a.stdout_offset() == b.stdout_offset() && a.stderr_offset() == b.stderr_offset() &&
         a.log_attempt() == b.log_attempt();
}

}  // namespace

ChangeCounts WatchTopic::counts() const {
  absl::MutexLock lock(&mu_);
  return counts_;
}

void WatchTopic::Count(const JobChange& change) {
  absl::MutexLock lock(&mu_);
  counts_.job += change.event || change.attempt || change.progress;
  counts_.events += change.event;
  counts_.points += change.points;
  // A new attempt moves watchers of logs on, and an attempt's end may complete its log.
  counts_.logs += change.logs || change.event || change.attempt;
}

absl::StatusOr<WatchTopic::Shared> WatchTopic::GetOrRead(const Shared& key,
                                                         const std::function<absl::StatusOr<Shared>()>& read) {
  absl::MutexLock lock(&read_mu_);
  const ChangeCounts now = counts();
  for (const Shared& entry : recent_) {
    if (entry.points != key.points || entry.logs != key.logs || entry.job_seen != key.job_seen ||
        !SameCursor(entry.from, key.from)) {
      continue;
    }
    // "Nothing new" is only right as long as nothing has changed, and a new watcher is told the job as it is now.
    if (entry.seen == now || (entry.update != nullptr && key.job_seen != 0)) return entry;
  }
  absl::StatusOr<Shared> made = read();
  if (!made.ok()) return made;
  made->bytes = made->update == nullptr ? 0 : static_cast<int64_t>(made->update->ByteSizeLong());
  while (!recent_.empty() &&
         (recent_.size() >= kSharedUpdates || shared_bytes_.load() + made->bytes > kMaxSharedBytes)) {
    DropOldest();
  }
  if (shared_bytes_.load() + made->bytes <= kMaxSharedBytes) {
    shared_bytes_ += made->bytes;
    recent_.push_front(*made);
  }
  return made;
}

void WatchTopic::DropOldest() {
  shared_bytes_ -= recent_.back().bytes;
  recent_.pop_back();
}

WatchTopic::~WatchTopic() {
  absl::MutexLock lock(&read_mu_);
  while (!recent_.empty()) DropOldest();
}

EventHub::Subscription::~Subscription() { hub_->Unsubscribe(job_, number_); }

absl::StatusOr<std::unique_ptr<EventHub::Subscription>> EventHub::Subscribe(const JobId& job, Wake wake) {
  absl::MutexLock lock(&mu_);
  if (closed()) return absl::UnavailableError("the gateway is stopping; connect again in a moment");
  if (watchers_ >= max_watchers_) {
    return absl::ResourceExhaustedError(
        absl::StrCat(watchers_, " watchers are connected, the most that are allowed; try again later, or ask with GetJob"));
  }
  ++watchers_;
  Watched& watched = jobs_[job];
  if (watched.topic == nullptr) watched.topic = std::make_shared<WatchTopic>(&shared_bytes_);
  const uint64_t number = next_number_++;
  watched.wakes.emplace_back(number, std::move(wake));
  return std::unique_ptr<Subscription>(new Subscription(this, job, watched.topic, number));
}

void EventHub::Unsubscribe(const JobId& job, uint64_t number) {
  absl::MutexLock lock(&mu_);
  const auto it = jobs_.find(job);
  ITWIN_CHECK(it != jobs_.end());
  auto& wakes = it->second.wakes;
  wakes.erase(std::remove_if(wakes.begin(), wakes.end(), [&](const auto& w) { return w.first == number; }), wakes.end());
  if (wakes.empty()) jobs_.erase(it);
  --watchers_;
}

void EventHub::OnCommit(absl::Span<const JobChange> changes) {
  absl::MutexLock lock(&mu_);
  if (jobs_.empty()) return;
  for (const JobChange& change : changes) {
    const auto it = jobs_.find(change.job);
    if (it == jobs_.end()) continue;
    it->second.topic->Count(change);
    for (const auto& [number, wake] : it->second.wakes) wake();
  }
}

void EventHub::Close() {
  absl::MutexLock lock(&mu_);
  closed_ = true;
  for (const auto& [job, watched] : jobs_) {
    for (const auto& [number, wake] : watched.wakes) wake();
  }
}

int EventHub::watchers() const {
  absl::MutexLock lock(&mu_);
  return watchers_;
}

}  // namespace itwin::server

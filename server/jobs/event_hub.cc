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

int64_t BytesOf(const WatchTopic::Shared& shared) {
  return shared.update == nullptr ? 0 : static_cast<int64_t>(shared.update->size());
}

void Merge(const JobChange& change, JobChange* into) {
  into->event |= change.event;
  into->attempt |= change.attempt;
  into->progress |= change.progress;
  into->points |= change.points;
  into->logs |= change.logs;
}

}  // namespace

ChangeCounts WatchTopic::counts() const {
  absl::MutexLock lock(&mu_);
  return counts_;
}

uint64_t WatchTopic::round() const {
  absl::MutexLock lock(&mu_);
  return round_;
}

void WatchTopic::BeginRound(const JobChange& change) {
  absl::MutexLock lock(&mu_);
  ++round_;
  expected_ = std::exchange(rested_, 0);
  over_ = false;
  counts_.job += change.event || change.attempt || change.progress;
  counts_.events += change.event;
  counts_.points += change.points;
  // A new attempt moves watchers of logs on, and an attempt's end may complete its log.
  counts_.logs += change.logs || change.event || change.attempt;
}

WatchTopic::Rest WatchTopic::Rested(const ChangeCounts& seen, Rounds* rounds) {
  absl::MutexLock lock(&mu_);
  if (counts_ != seen) return Rest::kNews;
  if (*rounds != round_) {
    *rounds = round_;
    ++rested_;
  }
  return RoundIsOver() ? Rest::kEndsRound : Rest::kRests;
}

bool WatchTopic::Left(const Rounds& rounds) {
  absl::MutexLock lock(&mu_);
  if (!rounds) return false;
  if (*rounds == round_) {
    --rested_;
  } else if (*rounds + 1 == round_) {
    --expected_;
  }
  return RoundIsOver();
}

// Once per round. A tenth may be missing: their networks are slow, or they have just gone.
bool WatchTopic::RoundIsOver() {
  if (over_ || rested_ * 10 < expected_ * 9) return false;
  over_ = true;
  return true;
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
  const int64_t bytes = BytesOf(*made);
  while (!recent_.empty() && (recent_.size() >= kSharedUpdates || shared_bytes_.load() + bytes > kMaxSharedBytes)) {
    DropOldest();
  }
  if (shared_bytes_.load() + bytes <= kMaxSharedBytes) {
    shared_bytes_ += bytes;
    recent_.push_front(*made);
  }
  return made;
}

void WatchTopic::DropOldest() {
  shared_bytes_ -= BytesOf(recent_.back());
  recent_.pop_back();
}

WatchTopic::~WatchTopic() {
  absl::MutexLock lock(&read_mu_);
  while (!recent_.empty()) DropOldest();
}

EventHub::EventHub(const Options& options, Clock* clock)
    : options_(options), clock_(*clock), rounds_([this] { Loop(); }) {}

EventHub::~EventHub() {
  Close();
  rounds_.join();
}

EventHub::Subscription::~Subscription() { hub_->Unsubscribe(job_, number_, rounds_); }

bool EventHub::Subscription::Rest(const ChangeCounts& seen) {
  const WatchTopic::Rest rest = topic_->Rested(seen, &rounds_);
  if (rest == WatchTopic::Rest::kEndsRound) hub_->EndRound(job_, *rounds_);
  return rest != WatchTopic::Rest::kNews;
}

absl::StatusOr<std::unique_ptr<EventHub::Subscription>> EventHub::Subscribe(const JobId& job, Wake wake) {
  absl::MutexLock lock(&mu_);
  if (closed()) return absl::UnavailableError("the gateway is stopping; connect again in a moment");
  if (watchers_ >= options_.max_watchers) {
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

void EventHub::Unsubscribe(const JobId& job, uint64_t number, const WatchTopic::Rounds& rounds) {
  absl::MutexLock lock(&mu_);
  const auto it = jobs_.find(job);
  ITWIN_CHECK(it != jobs_.end());
  auto& wakes = it->second.wakes;
  wakes.erase(std::remove_if(wakes.begin(), wakes.end(), [&](const auto& w) { return w.first == number; }), wakes.end());
  if (it->second.topic->Left(rounds)) EndRound(&it->second);
  if (wakes.empty()) jobs_.erase(it);
  --watchers_;
}

void EventHub::OnCommit(absl::Span<const JobChange> changes) {
  absl::MutexLock lock(&mu_);
  if (jobs_.empty()) return;
  std::optional<absl::Time> now;  // asked for when somebody watches
  for (const JobChange& change : changes) {
    const auto it = jobs_.find(change.job);
    if (it == jobs_.end()) continue;
    Watched& watched = it->second;
    if (!now) now = clock_.Now();
    if (*now >= watched.next_round) {
      Tell(&watched, change, *now);
    } else if (watched.waiting) {
      Merge(change, &*watched.waiting);
    } else {
      watched.waiting = change;
      reschedule_ = true;
    }
  }
}

void EventHub::Tell(Watched* watched, const JobChange& change, absl::Time now) {
  watched->round_began = now;
  watched->next_round = now + options_.longest_round;  // unless it ends
  watched->topic->BeginRound(change);
  for (const auto& [number, wake] : watched->wakes) wake();
}

void EventHub::EndRound(const JobId& job, uint64_t round) {
  absl::MutexLock lock(&mu_);
  const auto it = jobs_.find(job);
  if (it != jobs_.end() && it->second.topic->round() == round) EndRound(&it->second);
}

void EventHub::EndRound(Watched* watched) {
  const absl::Time now = clock_.Now();
  watched->next_round = now + (now - watched->round_began) / 2;
  reschedule_ |= watched->waiting.has_value();
}

void EventHub::Loop() {
  absl::MutexLock lock(&mu_);
  absl::Time next = absl::InfiniteFuture();
  while (!closed_) {
    clock_.AwaitUntil(mu_, absl::Condition(this, &EventHub::HasWork), next);
    reschedule_ = false;
    next = absl::InfiniteFuture();
    const absl::Time now = clock_.Now();
    for (auto& [job, watched] : jobs_) {
      if (!watched.waiting) continue;
      if (now < watched.next_round) {
        next = std::min(next, watched.next_round);
        continue;
      }
      const JobChange change = *watched.waiting;
      watched.waiting.reset();
      Tell(&watched, change, now);
    }
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

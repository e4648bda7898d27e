#include "server/store/commit_queue.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/log.h"

namespace itwin::server {
namespace {

constexpr size_t kMaxGroup = 512;  // bodies in one transaction

constexpr char kBegin[] = "BEGIN IMMEDIATE";
constexpr char kSavepoint[] = "SAVEPOINT body";
constexpr char kRelease[] = "RELEASE body";
constexpr char kRollbackTo[] = "ROLLBACK TO body";
constexpr char kCommit[] = "COMMIT";
constexpr char kRollback[] = "ROLLBACK";

void RunPrepared(SqliteConnection& connection, const char* sql) { Query(connection, sql).Run(); }

}  // namespace

CommitQueue::CommitQueue(SqliteConnection* connection, int max_waiting, Hooks hooks)
    : connection_(connection),
      max_waiting_(static_cast<size_t>(max_waiting)),
      hooks_(std::move(hooks)),
      thread_([this] { Loop(); }) {}

CommitQueue::~CommitQueue() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  thread_.join();
}

absl::Status CommitQueue::Run(Body body) {
  Item item(body);
  {
    absl::MutexLock lock(&mu_);
    if (stopping_) return absl::UnavailableError("the database is being closed");
    if (waiting_.size() >= max_waiting_) {
      return absl::ResourceExhaustedError(
          absl::StrCat(max_waiting_, " writes already wait for the database; try again in a moment"));
    }
    waiting_.push_back(&item);
    ++writes_;
  }
  item.done.WaitForNotification();
  return item.status;
}

int64_t CommitQueue::writes() const {
  absl::MutexLock lock(&mu_);
  return writes_;
}

int64_t CommitQueue::commits() const {
  absl::MutexLock lock(&mu_);
  return commits_;
}

void CommitQueue::Loop() {
  std::vector<Item*> group;
  while (true) {
    group.clear();
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &CommitQueue::HasWork));
      if (waiting_.empty()) return;  // stopping
      const size_t count = std::min(waiting_.size(), kMaxGroup);
      group.assign(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(count));
      waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(count));
    }
    RunGroup(group);
    for (Item* item : group) item->done.Notify();  // the item may be gone afterwards
  }
}

void CommitQueue::RunGroup(const std::vector<Item*>& group) {
  std::vector<JobChange> changes;
  bool took_back = false;
  absl::Status fatal = connection_->Guard([&] {
    RunPrepared(*connection_, kBegin);
    return absl::OkStatus();
  });
  bool any = false;
  for (Item* item : group) {
    if (!fatal.ok()) break;
    WriteContext context{*connection_, {}};
    item->status = connection_->Guard([&]() -> absl::Status {
      RunPrepared(*connection_, kSavepoint);
      absl::Status status = item->body(context);
      if (status.ok()) RunPrepared(*connection_, kRelease);
      return status;
    });
    if (item->status.ok()) {
      any = true;
      changes.insert(changes.end(), context.changes.begin(), context.changes.end());
      continue;
    }
    took_back = true;
    // Some errors (disk full while the cache spills) end the transaction: then the whole group is lost.
    fatal = connection_->autocommit() ? item->status : connection_->Guard([&] {
      RunPrepared(*connection_, kRollbackTo);
      RunPrepared(*connection_, kRelease);
      return absl::OkStatus();
    });
  }
  if (fatal.ok()) {
    fatal = connection_->Guard([&] {
      RunPrepared(*connection_, any ? kCommit : kRollback);
      return absl::OkStatus();
    });
  }
  if (!fatal.ok()) {
    if (!connection_->autocommit()) {
      connection_
          ->Guard([&] {
            RunPrepared(*connection_, kRollback);
            return absl::OkStatus();
          })
          .IgnoreError();  // the next BEGIN says what is wrong
    }
    log::Error("a commit of {} writes was taken back: {}", group.size(), std::string(fatal.message()));
    for (Item* item : group) {
      if (item->status.ok()) item->status = fatal;
    }
  }
  if ((took_back || !fatal.ok()) && hooks_.on_rollback) hooks_.on_rollback();
  if (fatal.ok() && any) {
    {
      absl::MutexLock lock(&mu_);
      ++commits_;
    }
    if (hooks_.on_commit && !changes.empty()) hooks_.on_commit(changes);
  }
}

}  // namespace itwin::server

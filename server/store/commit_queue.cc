#include "server/store/commit_queue.h"

#include <algorithm>
#include <iterator>
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

absl::Status CommitQueue::Execute(const char* sql) {
  return connection_->Guard([&] {
    Query(*connection_, sql).Run();
    return absl::OkStatus();
  });
}

CommitQueue::Outcome CommitQueue::RunBodies(const std::vector<Item*>& group, bool alone, std::vector<JobChange>* changes) {
  Outcome outcome;
  outcome.fatal = Execute(kBegin);
  for (Item* item : group) {
    if (!outcome.fatal.ok()) break;
    WriteContext context{*connection_, {}};
    const int64_t before = connection_->total_changes();
    item->status = connection_->Guard([&]() -> absl::Status {
      if (alone) RunPrepared(*connection_, kSavepoint);
      absl::Status status = item->body(context);
      if (alone && status.ok()) RunPrepared(*connection_, kRelease);
      return status;
    });
    if (item->status.ok()) {
      outcome.any = true;
      changes->insert(changes->end(), std::make_move_iterator(context.changes.begin()),
                      std::make_move_iterator(context.changes.end()));
    } else if (connection_->autocommit()) {
      // Some errors (disk full while the cache spills) end the transaction: then the whole group is lost.
      outcome.fatal = item->status;
    } else if (connection_->total_changes() == before && !alone) {
      // Refused before it wrote anything: nothing to take back.
    } else if (alone) {
      outcome.took_back = true;
      outcome.fatal = Execute(kRollbackTo);
      if (outcome.fatal.ok()) outcome.fatal = Execute(kRelease);
    } else {
      outcome.again = true;
      return outcome;
    }
  }
  return outcome;
}

void CommitQueue::RunGroup(const std::vector<Item*>& group) {
  std::vector<JobChange> changes;
  // Savepoints cost more than small bodies do, and few bodies fail after they have written: all together first, and only
  // when one has something to take back again, each in a savepoint of its own.
  Outcome outcome = RunBodies(group, /*alone=*/false, &changes);
  if (outcome.again) {
    outcome.fatal = Execute(kRollback);
    if (hooks_.on_rollback) hooks_.on_rollback();
    changes.clear();
    if (outcome.fatal.ok()) outcome = RunBodies(group, /*alone=*/true, &changes);
  }
  if (outcome.fatal.ok()) outcome.fatal = Execute(outcome.any ? kCommit : kRollback);
  if (!outcome.fatal.ok()) {
    if (!connection_->autocommit()) Execute(kRollback).IgnoreError();  // the next BEGIN says what is wrong
    log::Error("a commit of {} writes was taken back: {}", group.size(), std::string(outcome.fatal.message()));
    for (Item* item : group) {
      if (item->status.ok()) item->status = outcome.fatal;
    }
  }
  if ((outcome.took_back || !outcome.fatal.ok()) && hooks_.on_rollback) hooks_.on_rollback();
  if (outcome.fatal.ok() && outcome.any) {
    {
      absl::MutexLock lock(&mu_);
      ++commits_;
    }
    if (hooks_.on_commit && !changes.empty()) hooks_.on_commit(changes);
  }
}

}  // namespace itwin::server

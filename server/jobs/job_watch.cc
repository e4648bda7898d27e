#include "server/jobs/job_watch.h"

#include <string>
#include <utility>

#include "common/job_state.h"
#include "common/status_macros.h"
#include "server/jobs/job_proto.h"

namespace itwin::server {
namespace {

// Of one update: small enough to be quick on the wire, together below gRPC's default message limit of 4 MiB.
constexpr int kMaxEvents = 500;
constexpr int kMaxPoints = 20'000;
constexpr int kMaxLogBytes = 256 << 10;

}  // namespace

absl::StatusOr<std::unique_ptr<JobWatch>> JobWatch::Open(JobStore* store, EventHub* hub, const Options& options,
                                                         EventHub::Wake wake) {
  const v1::WatchCursor& cursor = options.cursor;
  if (cursor.event_sequence() < 0 || cursor.points() < 0 || cursor.stdout_offset() < 0 || cursor.stderr_offset() < 0 ||
      cursor.log_attempt() < 0) {
    return absl::InvalidArgumentError("cursor: has a negative number; pass the one of the last update, or none");
  }
  ITWIN_ASSIGN_OR_RETURN(std::unique_ptr<EventHub::Subscription> subscription,
                         hub->Subscribe(options.job, std::move(wake)));
  return std::unique_ptr<JobWatch>(new JobWatch(store, hub, options, std::move(subscription)));
}

absl::StatusOr<JobWatch::Step> JobWatch::Next() {
  while (true) {
    if (hub_.closed()) {
      return absl::UnavailableError("the gateway is stopping; connect again and go on with the last cursor");
    }
    WatchTopic& topic = subscription_->topic();
    if (Rests()) return Step{};
    // Which attempt is the newest is this watcher's question, before it shares answers with others.
    if (options_.logs && options_.cursor.log_attempt() == 0) {
      ITWIN_ASSIGN_OR_RETURN(const JobRow row, store_.GetJob(options_.job));
      options_.cursor.set_log_attempt(row.record.attempt);
    }
    WatchTopic::Shared key;
    key.from = options_.cursor;
    key.points = options_.points;
    key.logs = options_.logs;
    key.job_seen = job_seen_;
    ITWIN_ASSIGN_OR_RETURN(const WatchTopic::Shared shared, topic.GetOrRead(key, [&] { return Read(key); }));
    seen_ = shared.seen;
    more_ = shared.more;
    if (shared.update == nullptr) {
      if (shared.finished) return Step{nullptr, true};
      continue;  // rests, or has moved on to another log
    }
    options_.cursor = shared.to;
    if (shared.tells_job) job_seen_ = shared.seen.job + 1;
    return Step{shared.update, shared.finished};
  }
}

absl::StatusOr<WatchTopic::Shared> JobWatch::Read(const WatchTopic::Shared& key) {
  WatchTopic::Shared out = key;
  // Before the reads: what is committed between them is read again for nothing at worst, never missed.
  out.seen = subscription_->topic().counts();
  v1::JobUpdate update;
  *update.mutable_cursor() = key.from;
  v1::WatchCursor& cursor = *update.mutable_cursor();

  ITWIN_ASSIGN_OR_RETURN(const JobRow row, store_.GetJob(options_.job));
  bool news = false;
  // Also when its last change is older than this watch: the first update always has the job.
  if (key.job_seen != out.seen.job + 1) {
    *update.mutable_job() = ToProto(row);
    out.tells_job = true;
    news = true;
  }
  if (row.version > cursor.event_sequence()) {
    ITWIN_ASSIGN_OR_RETURN(const std::vector<StoredEvent> events,
                           store_.ListEvents(options_.job, cursor.event_sequence(), kMaxEvents));
    for (const StoredEvent& event : events) *update.add_events() = ToProto(event);
    if (!events.empty()) {
      cursor.set_event_sequence(events.back().sequence);
      news = true;
    }
    out.more |= static_cast<int>(events.size()) == kMaxEvents;
  }
  if (options_.points) {
    ITWIN_ASSIGN_OR_RETURN(PointsPage page, store_.ListPoints(options_.job, cursor.points(), {}, kMaxPoints));
    for (v1::PointBlock& block : page.blocks) *update.add_blocks() = std::move(block);
    news |= page.next_cursor != cursor.points();
    cursor.set_points(page.next_cursor);
    out.more |= !page.end;
  }
  if (options_.logs && row.record.attempt > 0) {
    const v1::WatchCursor before = cursor;
    ITWIN_RETURN_IF_ERROR(ReadLogs(row, &update, &out.more));
    news |= before.log_attempt() != cursor.log_attempt() || before.stdout_offset() != cursor.stdout_offset() ||
            before.stderr_offset() != cursor.stderr_offset();
  }
  out.finished = IsFinal(row.record.state) && !out.more;
  if (news) {
    out.to = cursor;
    out.update = std::make_shared<const std::string>(update.SerializeAsString());
  }
  return out;
}

absl::Status JobWatch::ReadLogs(const JobRow& row, v1::JobUpdate* update, bool* more) {
  v1::WatchCursor& cursor = *update->mutable_cursor();
  if (cursor.log_attempt() == 0) cursor.set_log_attempt(row.record.attempt);
  if (cursor.log_attempt() > row.record.attempt) {
    return absl::InvalidArgumentError("cursor: log_attempt is beyond the job's newest attempt; pass a cursor of this job");
  }
  ITWIN_ASSIGN_OR_RETURN(LogSlice out, store_.ReadLog(options_.job, cursor.log_attempt(), v1::LOG_STREAM_STDOUT,
                                                      cursor.stdout_offset(), kMaxLogBytes));
  ITWIN_ASSIGN_OR_RETURN(LogSlice err, store_.ReadLog(options_.job, cursor.log_attempt(), v1::LOG_STREAM_STDERR,
                                                      cursor.stderr_offset(), kMaxLogBytes));
  const bool ends = out.next_offset == out.size && err.next_offset == err.size;
  cursor.set_stdout_offset(out.next_offset);
  cursor.set_stderr_offset(err.next_offset);
  update->set_stdout_data(std::move(out.data));
  update->set_stderr_data(std::move(err.data));
  *more |= !ends;
  // The rest of an earlier attempt's log comes before the newest's.
  if (ends && cursor.log_attempt() < row.record.attempt && update->stdout_data().empty() &&
      update->stderr_data().empty()) {
    cursor.set_log_attempt(row.record.attempt);
    cursor.set_stdout_offset(0);
    cursor.set_stderr_offset(0);
    *more = true;
  } else if (cursor.log_attempt() < row.record.attempt) {
    *more = true;
  }
  return absl::OkStatus();
}

}  // namespace itwin::server

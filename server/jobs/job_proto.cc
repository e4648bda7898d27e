#include "server/jobs/job_proto.h"

#include <string>

#include "common/job_state_proto.h"

namespace itwin::server {
namespace {

int64_t Micros(absl::Time time) {
  return time == absl::InfinitePast() || time == absl::InfiniteFuture() ? 0 : absl::ToUnixMicros(time);
}

}  // namespace

v1::Job ToProto(const JobRow& row) {
  v1::Job out;
  out.set_id(row.id.text());
  out.set_name(row.name);
  out.set_state(itwin::ToProto(row.record.state));
  out.set_reason(row.waiting.empty() ? row.record.reason : row.waiting);
  out.set_site(row.record.site);
  out.set_attempt(row.record.attempt);
  out.set_cancel_requested(row.record.cancel_requested);
  out.set_created_us(Micros(row.created));
  out.set_started_us(Micros(row.started));
  out.set_finished_us(Micros(row.finished));
  *out.mutable_progress() = row.progress;
  if (row.record.state == JobState::kFailed) out.set_failure(itwin::ToProto(row.record.failure));
  out.mutable_summary()->insert(row.summary.begin(), row.summary.end());
  out.set_owner(row.owner);
  out.set_version(row.version);
  out.mutable_labels()->insert(row.labels.begin(), row.labels.end());
  out.set_ranks(row.ranks);
  out.set_retry_of(row.retry_of);
  return out;
}

v1::Attempt ToProto(const AttemptRow& row) {
  v1::Attempt out;
  out.set_number(row.number);
  out.set_site(row.site);
  out.set_scheduler_id(row.scheduler_id);
  out.set_submitted_us(Micros(row.submitted));
  out.set_started_us(Micros(row.started));
  out.set_ended_us(Micros(row.ended));
  out.set_host(row.host);
  if (row.exit_code) out.set_exit_code(*row.exit_code);
  out.set_signal(row.signal);
  out.set_failure(itwin::ToProto(row.failure));
  out.set_reason(row.reason);
  out.set_cpu_seconds(row.cpu_seconds);
  out.set_max_rss_bytes(row.max_rss_bytes);
  out.mutable_bad_nodes()->Add(row.bad_nodes.begin(), row.bad_nodes.end());
  return out;
}

v1::JobEvent ToProto(const StoredEvent& event) {
  v1::JobEvent out;
  out.set_sequence(event.sequence);
  out.set_time_us(Micros(event.event.time));
  out.set_attempt(event.event.attempt);
  out.set_kind(std::string(Name(event.event.kind)));
  out.set_state(itwin::ToProto(event.state));
  out.set_message(event.event.message);
  out.set_actor(event.event.actor);
  out.set_failure(itwin::ToProto(event.event.failure));
  return out;
}

}  // namespace itwin::server

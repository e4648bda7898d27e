#include "server/store/job_table.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "server/store/keys.h"

namespace itwin::server::job_table {
namespace {

constexpr size_t kMinPrefix = 4;
constexpr int kMaxPage = 1000;
constexpr int kNewestChecked = 100;  // jobs that the cheap Verify reads beside the live ones

#define JOB_COLUMNS                                                                                              \
  "num, id, owner, name, requested_site, ranks, labels, retry_of, resume, created_us, started_us, finished_us, " \
  "version, state, attempt, cancel_requested, site, reason, failure, not_before_us, retries_infra, "             \
  "retries_preempted, retries_app, retries_other, attempts_without_progress, trace_steps, traces, progress, "      \
  "summary, waiting"

constexpr char kGetJob[] = "SELECT " JOB_COLUMNS " FROM jobs WHERE id = ?";
constexpr char kGetJobByNumber[] = "SELECT " JOB_COLUMNS " FROM jobs WHERE num = ?";
constexpr char kGetNumber[] = "SELECT num FROM jobs WHERE id = ?";
constexpr char kFindRequest[] = "SELECT num, content_sha256 FROM jobs WHERE owner = ? AND request_id = ?";
constexpr char kGetSpec[] = "SELECT spec FROM specs WHERE job = ?";
constexpr char kFindPrefix[] = "SELECT id FROM jobs WHERE id >= ?1 AND id < ?1 || 'g' AND (?2 = '' OR owner = ?2) ORDER BY id LIMIT 5";
constexpr char kListLive[] =
    "SELECT " JOB_COLUMNS " FROM jobs INDEXED BY jobs_live WHERE state <= 10 AND version > ? ORDER BY version";
constexpr char kCountLive[] = "SELECT coalesce(sum(live), 0) FROM owners";
constexpr char kCountLiveOfOwner[] = "SELECT live FROM owners WHERE name = ?";

// The numbers of jobs that fit, newest first, by the index that serves best. '' and NULL-like values match all.
#define JOB_FILTER                                                                                        \
  " AND (?2 = '' OR j.site = ?2 OR (j.site = '' AND j.requested_site = ?2)) AND (?3 = '' OR instr(j.name, ?3) > 0) " \
  "AND (?4 = '' OR j.owner = ?4) ORDER BY j.num DESC LIMIT ?5"
constexpr char kListAll[] = "SELECT j.num FROM jobs j NOT INDEXED WHERE j.num < ?1" JOB_FILTER;
constexpr char kListByState[] =
    "SELECT j.num FROM jobs j INDEXED BY jobs_state WHERE j.state = ?6 AND j.num < ?1" JOB_FILTER;
constexpr char kListByOwnerAndState[] =
    "SELECT j.num FROM jobs j INDEXED BY jobs_owner_state WHERE j.owner = ?4 AND j.state = ?6 AND j.num < ?1" JOB_FILTER;
constexpr char kListByLabel[] =
    "SELECT j.num FROM labels l CROSS JOIN jobs j ON j.num = l.job WHERE l.key = ?6 AND l.value = ?7 AND l.job < ?1 "
    "AND (?2 = '' OR j.site = ?2 OR (j.site = '' AND j.requested_site = ?2)) AND (?3 = '' OR instr(j.name, ?3) > 0) "
    "AND (?4 = '' OR j.owner = ?4) ORDER BY l.job DESC LIMIT ?5";
constexpr char kHasLabel[] = "SELECT 1 FROM labels WHERE key = ? AND value = ? AND job = ?";
constexpr char kGetState[] = "SELECT state FROM jobs WHERE num = ?";

constexpr char kAddLive[] =
    "INSERT INTO owners (name, live) VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET live = live + 1";
constexpr char kSubtractLive[] = "UPDATE owners SET live = live - 1 WHERE name = ?";
constexpr char kInsertJob[] =
    "INSERT INTO jobs (id, owner, request_id, content_sha256, name, requested_site, ranks, labels, retry_of, resume, "
    "created_us, started_us, finished_us, version, state, attempt, cancel_requested, site, reason, failure, "
    "not_before_us, retries_infra, retries_preempted, retries_app, retries_other, attempts_without_progress, progress, "
    "summary) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0, ?, ?, 0, 0, '', ?, 0, 0, 0, 0, 0, 0, 0, x'', x'')";
constexpr char kNextSequence[] = "SELECT coalesce(max(sequence), 0) + 1 FROM events";
constexpr char kInsertSpec[] = "INSERT INTO specs (job, spec) VALUES (?, ?)";
constexpr char kInsertLabel[] = "INSERT INTO labels (key, value, job) VALUES (?, ?, ?)";
constexpr char kInsertEvent[] =
    "INSERT INTO events (job, time_us, kind, state, attempt, message, actor, failure, site, not_before_us, progress, "
    "steps, sequence) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
constexpr char kUpdateRecord[] =
    "UPDATE jobs SET version = ?, state = ?, attempt = ?, cancel_requested = ?, site = ?, reason = ?, failure = ?, "
    "not_before_us = ?, retries_infra = ?, retries_preempted = ?, retries_app = ?, retries_other = ?, "
    "attempts_without_progress = ?, trace_steps = ?, traces = ?, started_us = ?, finished_us = ?, progress = ?, "
    "summary = ?, waiting = ? WHERE num = ?";
constexpr char kUpdateFacts[] =
    "UPDATE jobs SET started_us = ?, progress = ?, summary = ?, waiting = ? WHERE num = ?";
constexpr char kSetProgress[] = "UPDATE jobs SET progress = ? WHERE num = ? AND attempt = ?";
constexpr char kListEvents[] =
    "SELECT sequence, time_us, kind, state, attempt, message, actor, failure, site, not_before_us, progress, steps FROM events "
    "INDEXED BY events_job WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?";

#define ATTEMPT_COLUMNS                                                                                          \
  "id, site, scheduler_id, submitted_us, started_us, ended_us, host, exit_code, signal, cause, failure, reason, " \
  "cpu_seconds, max_rss_bytes, max_step, checkpoint, resume_attempt, bad_lines, cursor, final_sizes, result_json, " \
  "bad_nodes"
constexpr char kGetAttempt[] = "SELECT " ATTEMPT_COLUMNS " FROM attempts WHERE id = ?";
constexpr char kListAttempts[] = "SELECT " ATTEMPT_COLUMNS " FROM attempts WHERE id > ? AND id < ? ORDER BY id";
constexpr char kInsertAttempt[] = "INSERT INTO attempts (id, site) VALUES (?, ?)";
constexpr char kUpdateAttempt[] =
    "UPDATE attempts SET scheduler_id = ?, submitted_us = ?, started_us = ?, ended_us = ?, host = ?, exit_code = ?, "
    "signal = ?, cause = ?, failure = ?, reason = ?, cpu_seconds = ?, max_rss_bytes = ?, max_step = ?, checkpoint = ?, "
    "resume_attempt = ?, final_sizes = ?, result_json = ?, bad_nodes = ? WHERE id = ?";
constexpr char kGetPosition[] = "SELECT cursor, max_step, bad_lines FROM attempts WHERE id = ?";
constexpr char kSetPosition[] = "UPDATE attempts SET cursor = ?, max_step = ?, bad_lines = ? WHERE id = ?";

constexpr char kDeleteOutputs[] = "DELETE FROM outputs WHERE job = ?";
constexpr char kDeleteCollected[] = "DELETE FROM outputs WHERE job = ? AND early = 0";
// What came early stays so when it is collected, too.
constexpr char kInsertOutput[] =
    "INSERT INTO outputs (job, path, sha256, size_bytes, early) VALUES (?, ?, ?, ?, ?) ON CONFLICT (job, path) DO UPDATE SET "
    "sha256 = excluded.sha256, size_bytes = excluded.size_bytes, early = max(early, excluded.early)";
constexpr char kListOutputs[] = "SELECT path, sha256, size_bytes FROM outputs WHERE job = ? ORDER BY path";

constexpr char kFindFinished[] =
    "SELECT num FROM jobs WHERE state > 10 AND finished_us > 0 AND finished_us < ? ORDER BY num LIMIT 1";
constexpr char kGetFinished[] = "SELECT labels FROM jobs WHERE num = ? AND state > 10 AND finished_us > 0 AND finished_us < ?";
constexpr char kDeleteLabel[] = "DELETE FROM labels WHERE key = ? AND value = ? AND job = ?";
constexpr char kDeleteSpec[] = "DELETE FROM specs WHERE job = ?";
constexpr char kDeleteEvents[] = "DELETE FROM events INDEXED BY events_job WHERE job = ?";
constexpr char kDeleteSeries[] = "DELETE FROM series WHERE job = ?";
constexpr char kDeleteSegments[] = "DELETE FROM point_segments WHERE id > ? AND id < ?";
constexpr char kDeleteAttempts[] = "DELETE FROM attempts WHERE id > ? AND id < ?";
constexpr char kDeleteLogs[] = "DELETE FROM log_chunks WHERE attempt > ? AND attempt < ?";
constexpr char kDeleteLogSizes[] = "DELETE FROM log_sizes WHERE attempt > ? AND attempt < ?";
constexpr char kDeleteJob[] = "DELETE FROM jobs WHERE num = ?";

constexpr char kVerifyAll[] = "SELECT " JOB_COLUMNS " FROM jobs ORDER BY num";
constexpr char kVerifySome[] =
    "SELECT " JOB_COLUMNS " FROM jobs WHERE state <= 10 OR num > (SELECT max(num) FROM jobs) - ?";
constexpr char kVerifyOwners[] =
    "SELECT o.name FROM owners o WHERE o.live <> (SELECT count(*) FROM jobs INDEXED BY jobs_owner_state WHERE owner = "
    "o.name AND state <= 10)";

int64_t Micros(absl::Time time) {
  return time == absl::InfinitePast() ? 0 : absl::ToUnixMicros(time);
}
absl::Time FromMicros(int64_t micros) {
  return micros == 0 ? absl::InfinitePast() : absl::FromUnixMicros(micros);
}
// What is stored: so that a folded record equals one that has just been applied.
absl::Time Rounded(absl::Time time) { return FromMicros(Micros(time)); }

absl::Status NoJob(absl::string_view id) {
  return absl::NotFoundError(absl::StrCat("there is no job '", absl::CHexEscape(id.substr(0, 40)),
                                          "'; list yours to see their ids"));
}

std::string SerializedSummary(const std::map<std::string, double>& summary) {
  v1::Job holder;
  for (const auto& [key, value] : summary) (*holder.mutable_summary())[key] = value;
  return holder.SerializeAsString();
}

template <typename Message>
Message Parsed(absl::string_view bytes) {
  Message message;
  // What we stored parses; a damaged row shows as empty rather than taking the job away.
  message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()));
  return message;
}

NumberedJob ReadJob(const Query& q) {
  NumberedJob out;
  JobRow& row = out.row;
  int i = 0;
  out.num = q.Int(i++);
  absl::StatusOr<JobId> id = JobId::Parse(q.Text(i++));
  if (id.ok()) row.id = *std::move(id);
  row.owner = q.Text(i++);
  row.name = q.Text(i++);
  row.requested_site = q.Text(i++);
  row.ranks = static_cast<int>(q.Int(i++));
  if (const absl::string_view labels = q.Bytes(i++); !labels.empty()) {
    const auto holder = Parsed<v1::Job>(labels);
    row.labels.insert(holder.labels().begin(), holder.labels().end());
  }
  row.retry_of = q.Text(i++);
  if (absl::StatusOr<AttemptKey> resume = AttemptKey::Parse(q.Text(i++)); resume.ok()) row.resume = *resume;
  row.created = FromMicros(q.Int(i++));
  row.started = FromMicros(q.Int(i++));
  row.finished = FromMicros(q.Int(i++));
  row.version = q.Int(i++);
  JobRecord& record = row.record;
  record.state = static_cast<JobState>(q.Int(i++));
  record.attempt = static_cast<int>(q.Int(i++));
  record.cancel_requested = q.Int(i++) != 0;
  record.site = q.Text(i++);
  record.reason = q.Text(i++);
  record.failure = static_cast<FailureClass>(q.Int(i++));
  record.not_before = FromMicros(q.Int(i++));
  record.retries_infra = static_cast<int>(q.Int(i++));
  record.retries_preempted = static_cast<int>(q.Int(i++));
  record.retries_app = static_cast<int>(q.Int(i++));
  record.retries_other = static_cast<int>(q.Int(i++));
  record.attempts_without_progress = static_cast<int>(q.Int(i++));
  record.trace_steps = q.Int(i++);
  record.traces = static_cast<int>(q.Int(i++));
  if (const absl::string_view progress = q.Bytes(i++); !progress.empty()) row.progress = Parsed<v1::Progress>(progress);
  if (const absl::string_view summary = q.Bytes(i++); !summary.empty()) {
    const auto holder = Parsed<v1::Job>(summary);
    row.summary.insert(holder.summary().begin(), holder.summary().end());
  }
  row.waiting = q.Text(i++);
  return out;
}

AttemptRow ReadAttempt(const Query& q) {
  AttemptRow row;
  int i = 0;
  row.number = AttemptNumber(q.Int(i++));
  row.site = q.Text(i++);
  row.scheduler_id = q.Text(i++);
  row.submitted = FromMicros(q.Int(i++));
  row.started = FromMicros(q.Int(i++));
  row.ended = FromMicros(q.Int(i++));
  row.host = q.Text(i++);
  if (!q.IsNull(i)) row.exit_code = static_cast<int>(q.Int(i));
  ++i;
  row.signal = static_cast<int>(q.Int(i++));
  row.cause = static_cast<agent::v1::EndCause>(q.Int(i++));
  row.failure = static_cast<FailureClass>(q.Int(i++));
  row.reason = q.Text(i++);
  row.cpu_seconds = q.Double(i++);
  row.max_rss_bytes = q.Int(i++);
  row.max_step = q.Int(i++);
  row.checkpoint = q.Int(i++) != 0;
  row.resume_attempt = q.Text(i++);
  row.bad_lines = q.Int(i++);
  row.cursor = Parsed<agent::v1::SpoolCursor>(q.Bytes(i++));
  if (!q.IsNull(i)) row.final_sizes = Parsed<agent::v1::SpoolSizes>(q.Bytes(i));
  ++i;
  row.result_json = q.Text(i++);
  row.bad_nodes = absl::StrSplit(q.Text(i++), '\n', absl::SkipEmpty());
  return row;
}

StoredEvent ReadEvent(const Query& q) {
  StoredEvent out;
  int i = 0;
  out.sequence = q.Int(i++);
  out.event.time = FromMicros(q.Int(i++));
  out.event.kind = static_cast<EventKind>(q.Int(i++));
  out.state = static_cast<JobState>(q.Int(i++));
  out.event.attempt = static_cast<int>(q.Int(i++));
  out.event.message = q.Text(i++);
  out.event.actor = q.Text(i++);
  out.event.failure = static_cast<FailureClass>(q.Int(i++));
  out.event.site = q.Text(i++);
  out.event.not_before = FromMicros(q.Int(i++));
  out.event.progress = q.Int(i++) != 0;
  out.event.steps = q.Int(i++);
  return out;
}

int64_t InsertEvent(SqliteConnection& c, int64_t num, const JobEvent& event, JobState after, int64_t sequence) {
  Query(c, kInsertEvent, num, Micros(event.time), static_cast<int>(event.kind), static_cast<int>(after), event.attempt,
        event.message, event.actor, static_cast<int>(event.failure), event.site, Micros(event.not_before),
        event.progress, event.steps, sequence)
      .Run();
  return sequence;
}

int64_t NextSequence(SqliteConnection& c) {
  Query q(c, kNextSequence);
  q.Step();
  return q.Int(0);
}

std::optional<AttemptRow> FindAttemptRow(SqliteConnection& c, int64_t id) {
  Query q(c, kGetAttempt, id);
  if (!q.Step()) return std::nullopt;
  return ReadAttempt(q);
}

void Merge(const AttemptUpdate& u, AttemptRow* row) {
  if (u.scheduler_id) row->scheduler_id = *u.scheduler_id;
  if (u.submitted) row->submitted = *u.submitted;
  if (u.started) row->started = *u.started;
  if (u.ended) row->ended = *u.ended;
  if (u.host) row->host = *u.host;
  if (u.exit_code) row->exit_code = *u.exit_code;
  if (u.signal) row->signal = *u.signal;
  if (u.cause) row->cause = *u.cause;
  if (u.failure) row->failure = *u.failure;
  if (u.reason) row->reason = *u.reason;
  if (u.cpu_seconds) row->cpu_seconds = *u.cpu_seconds;
  if (u.max_rss_bytes) row->max_rss_bytes = *u.max_rss_bytes;
  if (u.max_step) row->max_step = std::max(row->max_step, *u.max_step);
  if (u.checkpoint) row->checkpoint = *u.checkpoint;
  if (u.resume_attempt) row->resume_attempt = *u.resume_attempt;
  if (u.result_json) row->result_json = *u.result_json;
  if (u.final_sizes) row->final_sizes = *u.final_sizes;
  if (u.bad_nodes) row->bad_nodes = *u.bad_nodes;
}

void StoreAttempt(SqliteConnection& c, int64_t id, const AttemptRow& row) {
  std::string sizes;
  if (row.final_sizes) sizes = row.final_sizes->SerializeAsString();
  // The statement has a place for each value; NULL stands for "not known".
  Query q(c, kUpdateAttempt, row.scheduler_id, Micros(row.submitted), Micros(row.started), Micros(row.ended), row.host);
  int i = 5;
  if (row.exit_code) {
    q.Bind(++i, *row.exit_code);
  } else {
    q.Bind(++i, Query::Null{});
  }
  q.Bind(++i, row.signal);
  q.Bind(++i, static_cast<int>(row.cause));
  q.Bind(++i, static_cast<int>(row.failure));
  q.Bind(++i, row.reason);
  q.Bind(++i, row.cpu_seconds);
  q.Bind(++i, row.max_rss_bytes);
  q.Bind(++i, row.max_step);
  q.Bind(++i, row.checkpoint);
  q.Bind(++i, row.resume_attempt);
  if (row.final_sizes) {
    q.Bind(++i, Borrowed{sizes});
  } else {
    q.Bind(++i, Query::Null{});
  }
  q.Bind(++i, row.result_json);
  q.Bind(++i, absl::StrJoin(row.bad_nodes, "\n"));
  q.Bind(++i, id);
  q.Run();
}

void StoreOutputs(SqliteConnection& c, int64_t num, const AttemptUpdate& update) {
  const auto insert = [&](const v1::OutputFile& file, bool early) {
    Query(c, kInsertOutput, num, file.path(), file.sha256(), file.size_bytes(), early).Run();
  };
  if (update.outputs) {
    Query(c, kDeleteCollected, num).Run();
    for (const v1::OutputFile& file : *update.outputs) insert(file, /*early=*/false);
  }
  if (update.early_output) insert(*update.early_output, /*early=*/true);
}

// What an update says about the job itself.
void MergeIntoJob(const AttemptUpdate& update, bool newest, JobRow* row) {
  if (!newest) return;
  if (update.started) row->started = Rounded(*update.started);
  if (update.progress) row->progress = *update.progress;
  if (update.summary) row->summary = *update.summary;
  if (update.waiting) row->waiting = *update.waiting;
}

absl::Status CheckRecord(SqliteConnection& c, const NumberedJob& job) {
  const auto wrong = [&](absl::string_view why) {
    return absl::DataLossError(absl::StrCat("job ", job.row.id.text(), ": ", why));
  };
  JobRecord record;
  int64_t version = 0;
  Query q(c, kListEvents, job.num, 0, -1);
  while (q.Step()) {
    const StoredEvent stored = ReadEvent(q);
    const absl::Status applied =
        version == 0 ? ApplyFirst(stored.event, &record) : Apply(stored.event, &record);
    if (!applied.ok()) return wrong(absl::StrCat("event ", stored.sequence, ": ", applied.message()));
    if (record.state != stored.state) {
      return wrong(absl::StrCat("event ", stored.sequence, " leads to ", Name(record.state), ", stored is ",
                                Name(stored.state)));
    }
    version = stored.sequence;
  }
  if (version == 0) return wrong("has no events");
  if (version != job.row.version) return wrong("its version is not its newest event");
  if (!(record == job.row.record)) return wrong("its record is not what its events say");
  if (record.attempt > 0 && !FindAttemptRow(c, AttemptRowId(job.num, record.attempt))) {
    return wrong("its newest attempt has no row");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<int64_t> NumberOf(SqliteConnection& c, const JobId& job) {
  Query q(c, kGetNumber, job.text());
  if (!q.Step()) return NoJob(job.text());
  return q.Int(0);
}

absl::StatusOr<NumberedJob> Get(SqliteConnection& c, const JobId& job) {
  Query q(c, kGetJob, job.text());
  if (!q.Step()) return NoJob(job.text());
  return ReadJob(q);
}

absl::StatusOr<v1::JobSpec> GetSpec(SqliteConnection& c, const JobId& job) {
  ITWIN_ASSIGN_OR_RETURN(const int64_t num, NumberOf(c, job));
  Query q(c, kGetSpec, num);
  v1::JobSpec spec;
  if (!q.Step() || !spec.ParseFromArray(q.Bytes(0).data(), static_cast<int>(q.Bytes(0).size()))) {
    return absl::DataLossError(absl::StrCat("job ", job.text(), ": its stored spec cannot be read"));
  }
  return spec;
}

absl::StatusOr<JobId> Resolve(SqliteConnection& c, absl::string_view prefix, absl::string_view owner) {
  const bool hex = std::all_of(prefix.begin(), prefix.end(), [](char ch) {
    return absl::ascii_isdigit(static_cast<unsigned char>(ch)) || (ch >= 'a' && ch <= 'f');
  });
  if (!hex || prefix.size() < kMinPrefix || prefix.size() > 16) {
    return absl::InvalidArgumentError(absl::StrCat("'", absl::CHexEscape(prefix.substr(0, 40)),
                                                   "' is not a job id: use its 16 hex digits, or the first ",
                                                   kMinPrefix, " or more of them"));
  }
  std::vector<std::string> found;
  Query q(c, kFindPrefix, prefix, owner);
  while (q.Step()) found.push_back(q.Text(0));
  if (found.empty()) return NoJob(prefix);
  if (found.size() > 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        "several jobs begin with '", prefix, "': ", absl::StrJoin(found, ", "), found.size() == 5 ? ", ..." : "",
        "; give more digits"));
  }
  return JobId::Parse(found[0]);
}

absl::StatusOr<JobPage> List(SqliteConnection& c, const JobFilter& filter) {
  int64_t before = INT64_MAX;
  if (!filter.page_token.empty() &&
      (!absl::SimpleHexAtoi(filter.page_token, &before) || before <= 0)) {
    return absl::InvalidArgumentError("page_token is not one that this service gave; leave it empty to start again");
  }
  const int page = std::clamp(filter.page_size == 0 ? 50 : filter.page_size, 1, kMaxPage);
  std::vector<JobState> states = filter.states;
  if (filter.live_only) {
    if (states.empty()) states = AllJobStates();
    states.erase(std::remove_if(states.begin(), states.end(), IsFinal), states.end());
    if (states.empty()) return JobPage{};
  }
  std::sort(states.begin(), states.end());
  states.erase(std::unique(states.begin(), states.end()), states.end());

  std::vector<int64_t> numbers;
  const auto collect = [&](Query& q) {
    while (q.Step()) numbers.push_back(q.Int(0));
  };
  const int64_t wanted = page + 1;  // one more shows whether there is a next page
  if (!filter.labels.empty()) {
    const auto& [key, value] = *filter.labels.begin();
    int64_t from = before;
    // The first label leads; what the others and the states refuse is made up for by the next portion.
    while (static_cast<int64_t>(numbers.size()) < wanted) {
      std::vector<int64_t> portion;
      {
        Query q(c, kListByLabel, from, filter.site, filter.name_contains, filter.owner, wanted, key, value);
        while (q.Step()) portion.push_back(q.Int(0));
      }
      for (const int64_t num : portion) {
        bool fits = true;
        for (auto it = std::next(filter.labels.begin()); fits && it != filter.labels.end(); ++it) {
          fits = Query(c, kHasLabel, it->first, it->second, num).Step();
        }
        if (fits && !states.empty()) {
          Query q(c, kGetState, num);
          fits = q.Step() && std::binary_search(states.begin(), states.end(), static_cast<JobState>(q.Int(0)));
        }
        if (fits) numbers.push_back(num);
      }
      if (static_cast<int64_t>(portion.size()) < wanted) break;
      from = portion.back();
    }
  } else if (!states.empty() || !filter.owner.empty()) {
    const char* sql = filter.owner.empty() ? kListByState : kListByOwnerAndState;
    for (const JobState state : states.empty() ? AllJobStates() : states) {
      Query q(c, sql, before, filter.site, filter.name_contains, filter.owner, wanted, static_cast<int>(state));
      collect(q);
    }
    std::sort(numbers.begin(), numbers.end(), std::greater<>());
  } else {
    Query q(c, kListAll, before, filter.site, filter.name_contains, filter.owner, wanted);
    collect(q);
  }
  JobPage out;
  if (numbers.size() > static_cast<size_t>(page)) {
    numbers.resize(static_cast<size_t>(page));
    out.next_page_token = absl::StrCat(absl::Hex(numbers.back()));
  }
  out.jobs.reserve(numbers.size());
  for (const int64_t num : numbers) {
    Query q(c, kGetJobByNumber, num);
    if (q.Step()) out.jobs.push_back(ReadJob(q).row);
  }
  return out;
}

absl::StatusOr<std::vector<JobRow>> ListLive(SqliteConnection& c, absl::string_view site, int64_t after_version) {
  std::vector<JobRow> out;
  Query q(c, kListLive, after_version);
  while (q.Step()) {
    JobRow row = ReadJob(q).row;
    if (site.empty() || row.record.site == site) out.push_back(std::move(row));
  }
  return out;
}

int64_t CountLive(SqliteConnection& c, absl::string_view owner) {
  if (owner.empty()) {
    Query q(c, kCountLive);
    return q.Step() ? q.Int(0) : 0;
  }
  Query q(c, kCountLiveOfOwner, owner);
  return q.Step() ? q.Int(0) : 0;
}

std::string ContentSha256(const NewJob& job) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    job.spec.SerializeToCodedStream(&coded);
  }
  absl::StrAppend(&bytes, "\n", job.retry_of, "\n", job.resume ? job.resume->text() : "");
  return Sha256Hex(bytes);
}

absl::StatusOr<std::optional<JobRow>> FindSubmitted(SqliteConnection& c, const NewJob& job,
                                                    const std::string& content_sha256) {
  Query q(c, kFindRequest, job.owner, job.request_id);
  if (!q.Step()) return std::nullopt;
  if (q.Text(1) != content_sha256) {
    return absl::AlreadyExistsError(
        absl::StrCat("request_id '", job.request_id,
                     "' was used for a job with another spec; make a new request id for a new job"));
  }
  Query found(c, kGetJobByNumber, q.Int(0));
  if (!found.Step()) return absl::DataLossError("a job that an index names is missing");
  return ReadJob(found).row;
}

absl::StatusOr<Submitted> Submit(SqliteConnection& c, const NewJob& job, const std::string& content_sha256,
                                 int64_t max_live_per_owner) {
  ITWIN_ASSIGN_OR_RETURN(std::optional<JobRow> before, FindSubmitted(c, job, content_sha256));
  if (before) return Submitted{*std::move(before), true};
  const int64_t live = CountLive(c, job.owner);
  if (live >= max_live_per_owner) {
    return absl::ResourceExhaustedError(absl::StrCat("'", job.owner, "' has ", live,
                                                     " jobs that are not finished, the most that are allowed; wait for "
                                                     "some to end, or cancel some"));
  }

  Submitted out;
  JobRow& row = out.job;
  JobEvent event;
  event.kind = EventKind::kSubmitted;
  event.time = Rounded(absl::Now());
  event.message = job.message.empty() ? "accepted; waits for a site" : job.message;
  event.actor = job.actor.empty() ? absl::StrCat("user:", job.owner) : job.actor;
  ITWIN_RETURN_IF_ERROR(ApplyFirst(event, &row.record));
  row.id = JobId::Random();
  row.name = job.spec.name();
  row.owner = job.owner;
  row.created = event.time;
  row.requested_site = job.spec.site();
  row.ranks = std::max(1, job.spec.resources().nodes()) * std::max(1, job.spec.resources().ranks_per_node());
  row.labels.insert(job.spec.labels().begin(), job.spec.labels().end());
  row.retry_of = job.retry_of;
  row.resume = job.resume;
  row.version = NextSequence(c);

  std::string labels;
  if (!row.labels.empty()) {
    v1::Job holder;
    *holder.mutable_labels() = job.spec.labels();
    labels = holder.SerializeAsString();
  }
  Query(c, kInsertJob, row.id.text(), row.owner, job.request_id, content_sha256, row.name, row.requested_site,
        row.ranks, Borrowed{labels}, row.retry_of, row.resume ? row.resume->text() : std::string(),
        Micros(row.created), row.version, static_cast<int>(row.record.state), row.record.reason)
      .Run();
  const int64_t num = c.last_insert_rowid();
  const std::string spec = job.spec.SerializeAsString();
  Query(c, kInsertSpec, num, Borrowed{spec}).Run();
  for (const auto& [key, value] : row.labels) Query(c, kInsertLabel, key, value, num).Run();
  InsertEvent(c, num, event, row.record.state, row.version);
  Query(c, kAddLive, job.owner).Run();
  return out;
}

absl::StatusOr<JobRow> AppendEvent(SqliteConnection& c, const JobId& job, JobEvent event,
                                   const AttemptUpdate& update) {
  ITWIN_ASSIGN_OR_RETURN(NumberedJob numbered, Get(c, job));
  JobRow& row = numbered.row;
  event.time = Rounded(event.time == absl::Time() ? absl::Now() : event.time);
  event.not_before = Rounded(event.not_before);
  const bool was_final = IsFinal(row.record.state);
  if (absl::Status applied = Apply(event, &row.record); !applied.ok()) {
    return Annotate(applied, absl::StrCat("job ", job.text()));
  }
  const int64_t num = numbered.num;
  const int attempt = event.attempt != 0 ? event.attempt : row.record.attempt;
  const int64_t attempt_row = AttemptRowId(num, attempt);

  // What it waited for is over once it moves on.
  const bool moves = event.kind != EventKind::kNote && event.kind != EventKind::kCancelRequested &&
                     event.kind != EventKind::kTraceRequested && event.kind != EventKind::kTraced;
  if (moves) row.waiting.clear();
  AttemptUpdate merged = update;
  switch (event.kind) {
    case EventKind::kPlaced:
      Query(c, kInsertAttempt, attempt_row, event.site).Run();
      row.started = absl::InfinitePast();
      break;
    case EventKind::kAccepted:
    case EventKind::kHeld:
      if (!merged.submitted) merged.submitted = event.time;
      break;
    case EventKind::kStarted:
      if (!merged.started && row.started == absl::InfinitePast()) merged.started = event.time;
      break;
    case EventKind::kEnded:
      if (!merged.ended) merged.ended = event.time;
      break;
    case EventKind::kRequeued:
    case EventKind::kFailed:
      // Why this attempt was not the last, or was: unless the event is about no attempt.
      if (event.attempt != 0 && !merged.failure) merged.failure = event.failure;
      if (event.attempt != 0 && !merged.reason) merged.reason = event.message;
      break;
    case EventKind::kSubmitted:
    case EventKind::kStaged:
    case EventKind::kSubmitUnclear:
    case EventKind::kReleased:
    case EventKind::kSuspended:
    case EventKind::kStateUnclear:
    case EventKind::kSucceeded:
    case EventKind::kCancelled:
    case EventKind::kCancelRequested:
    case EventKind::kNote:
    case EventKind::kTraceRequested:
    case EventKind::kTraced:
      break;
  }
  if (merged.waiting) row.waiting = *std::exchange(merged.waiting, std::nullopt);  // also before the first attempt
  if (!merged.empty()) {
    std::optional<AttemptRow> stored = FindAttemptRow(c, attempt_row);
    if (attempt == 0 || !stored) {
      return absl::FailedPreconditionError(
          absl::StrCat("job ", job.text(), ": facts about attempt ", attempt, ", which does not exist"));
    }
    // Held and accepted tell the same twice; the first time counts unless the caller says otherwise.
    if (!update.submitted && stored->submitted != absl::InfinitePast()) merged.submitted.reset();
    Merge(merged, &*stored);
    StoreAttempt(c, attempt_row, *stored);
    StoreOutputs(c, num, merged);
    MergeIntoJob(merged, attempt == row.record.attempt, &row);
  }
  if (!was_final && IsFinal(row.record.state)) {
    row.finished = event.time;
    Query(c, kSubtractLive, row.owner).Run();
  }
  row.version = InsertEvent(c, num, event, row.record.state, NextSequence(c));
  const JobRecord& r = row.record;
  const std::string progress = row.progress.SerializeAsString();
  const std::string summary = SerializedSummary(row.summary);
  Query(c, kUpdateRecord, row.version, static_cast<int>(r.state), r.attempt, r.cancel_requested, r.site, r.reason,
        static_cast<int>(r.failure), Micros(r.not_before), r.retries_infra, r.retries_preempted, r.retries_app,
        r.retries_other, r.attempts_without_progress, r.trace_steps, r.traces, Micros(row.started), Micros(row.finished), Borrowed{progress},
        Borrowed{summary}, row.waiting, num)
      .Run();
  return std::move(row);
}

absl::Status UpdateAttempt(SqliteConnection& c, const AttemptKey& attempt, const AttemptUpdate& update) {
  ITWIN_ASSIGN_OR_RETURN(NumberedJob numbered, Get(c, attempt.job()));
  const int64_t id = AttemptRowId(numbered.num, attempt.number());
  std::optional<AttemptRow> stored = FindAttemptRow(c, id);
  if (!stored) return absl::NotFoundError(absl::StrCat("there is no attempt ", attempt.text()));
  Merge(update, &*stored);
  StoreAttempt(c, id, *stored);
  StoreOutputs(c, numbered.num, update);
  JobRow& row = numbered.row;
  if (attempt.number() == row.record.attempt &&
      (update.started || update.progress || update.summary || update.waiting)) {
    MergeIntoJob(update, true, &row);
    const std::string progress = row.progress.SerializeAsString();
    const std::string summary = SerializedSummary(row.summary);
    Query(c, kUpdateFacts, Micros(row.started), Borrowed{progress}, Borrowed{summary}, row.waiting, numbered.num).Run();
  }
  return absl::OkStatus();
}

void SetProgress(SqliteConnection& c, int64_t num, int attempt, const v1::Progress& progress) {
  const std::string bytes = progress.SerializeAsString();
  Query(c, kSetProgress, Borrowed{bytes}, num, attempt).Run();
}

absl::StatusOr<std::vector<AttemptRow>> ListAttempts(SqliteConnection& c, const JobId& job) {
  ITWIN_ASSIGN_OR_RETURN(const int64_t num, NumberOf(c, job));
  std::vector<AttemptRow> out;
  Query q(c, kListAttempts, AttemptRowId(num, 0), AttemptRowId(num + 1, 0));
  while (q.Step()) out.push_back(ReadAttempt(q));
  return out;
}

absl::StatusOr<AttemptRow> GetAttempt(SqliteConnection& c, const AttemptKey& attempt) {
  ITWIN_ASSIGN_OR_RETURN(const int64_t num, NumberOf(c, attempt.job()));
  std::optional<AttemptRow> row = FindAttemptRow(c, AttemptRowId(num, attempt.number()));
  if (!row) return absl::NotFoundError(absl::StrCat("there is no attempt ", attempt.text()));
  return *std::move(row);
}

absl::StatusOr<std::vector<StoredEvent>> ListEvents(SqliteConnection& c, const JobId& job, int64_t after_sequence,
                                                    int limit) {
  ITWIN_ASSIGN_OR_RETURN(const int64_t num, NumberOf(c, job));
  std::vector<StoredEvent> out;
  Query q(c, kListEvents, num, after_sequence, limit);
  while (q.Step()) out.push_back(ReadEvent(q));
  return out;
}

absl::StatusOr<std::vector<v1::OutputFile>> ListOutputs(SqliteConnection& c, const JobId& job) {
  ITWIN_ASSIGN_OR_RETURN(const int64_t num, NumberOf(c, job));
  std::vector<v1::OutputFile> out;
  Query q(c, kListOutputs, num);
  while (q.Step()) {
    v1::OutputFile& file = out.emplace_back();
    file.set_path(q.Text(0));
    file.set_sha256(q.Text(1));
    file.set_size_bytes(q.Int(2));
  }
  return out;
}

std::optional<SpoolPosition> FindSpoolPosition(SqliteConnection& c, int64_t attempt_row) {
  Query q(c, kGetPosition, attempt_row);
  if (!q.Step()) return std::nullopt;
  return SpoolPosition{Parsed<agent::v1::SpoolCursor>(q.Bytes(0)), q.Int(1), q.Int(2)};
}

void SetSpoolPosition(SqliteConnection& c, int64_t attempt_row, const SpoolPosition& position) {
  const std::string cursor = position.cursor.SerializeAsString();
  Query(c, kSetPosition, Borrowed{cursor}, position.max_step, position.bad_lines, attempt_row).Run();
}

std::optional<int64_t> FindFinishedBefore(SqliteConnection& c, absl::Time before) {
  Query q(c, kFindFinished, Micros(before));
  if (!q.Step()) return std::nullopt;
  return q.Int(0);
}

bool RemoveFinished(SqliteConnection& c, int64_t num, absl::Time before) {
  v1::Job holder;
  {
    Query q(c, kGetFinished, num, Micros(before));
    if (!q.Step()) return false;
    holder = Parsed<v1::Job>(q.Bytes(0));
  }
  for (const auto& [key, value] : holder.labels()) Query(c, kDeleteLabel, key, value, num).Run();
  for (const char* sql : {kDeleteSpec, kDeleteEvents, kDeleteOutputs, kDeleteSeries}) Query(c, sql, num).Run();
  Query(c, kDeleteSegments, SegmentRowId(num, 0), SegmentRowId(num + 1, 0)).Run();
  for (const char* sql : {kDeleteAttempts, kDeleteLogs, kDeleteLogSizes}) {
    Query(c, sql, AttemptRowId(num, 0), AttemptRowId(num + 1, 0)).Run();
  }
  Query(c, kDeleteJob, num).Run();
  return true;
}

absl::Status Verify(SqliteConnection& c, bool all) {
  std::vector<NumberedJob> jobs;
  {
    Query owners(c, kVerifyOwners);
    if (owners.Step()) {
      return absl::DataLossError(absl::StrCat("the count of live jobs of '", owners.Text(0), "' is wrong"));
    }
  }
  const auto check = [&](Query& q) -> absl::Status {
    while (q.Step()) ITWIN_RETURN_IF_ERROR(CheckRecord(c, ReadJob(q)));
    return absl::OkStatus();
  };
  if (all) {
    Query q(c, kVerifyAll);
    return check(q);
  }
  Query q(c, kVerifySome, kNewestChecked);
  return check(q);
}

}  // namespace itwin::server::job_table

namespace itwin::server {

bool AttemptUpdate::empty() const {
  return !scheduler_id && !submitted && !started && !ended && !host && !exit_code && !signal && !cause && !failure &&
         !reason && !cpu_seconds && !max_rss_bytes && !max_step && !checkpoint && !resume_attempt && !result_json &&
         !final_sizes && !bad_nodes && !summary && !outputs && !early_output && !progress && !waiting;
}

}  // namespace itwin::server

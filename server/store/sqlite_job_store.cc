#include "server/store/sqlite_job_store.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "server/store/job_table.h"
#include "server/store/keys.h"
#include "server/store/log_table.h"
#include "server/store/point_table.h"
#include "server/store/site_table.h"
#include "server/store/sqlite_database.h"
#include "server/store/token_table.h"

namespace itwin::server {
namespace {

constexpr int kMaxEventsPerRead = 10'000;
constexpr int kMaxPointsPerRead = 1'000'000;
constexpr int kMaxLogBytesPerRead = 4 << 20;
constexpr int kMaxBuckets = 10'000;

// Where the file of a batch stands. Node files are made on first use.
int64_t* PositionOf(agent::v1::SpoolCursor* cursor, const SpoolBatch& batch, int64_t scratch[3]) {
  // Proto fields are not addressable; the three of fixed files go through `scratch` and back.
  if (batch.file == agent::v1::SPOOL_FILE_METRICS) return &scratch[0];
  if (batch.file == agent::v1::SPOOL_FILE_STDOUT) return &scratch[1];
  if (batch.file == agent::v1::SPOOL_FILE_STDERR) return &scratch[2];
  if (batch.file == agent::v1::SPOOL_FILE_NODE) return &(*cursor->mutable_nodes())[batch.host];
  return nullptr;
}

// An attempt while the batches of one commit are applied.
struct OpenAttempt {
  bool known = false;
  int64_t job = 0;
  int64_t row = 0;
  job_table::SpoolPosition position;
  int64_t fixed[3] = {0, 0, 0};  // metrics, stdout, stderr
  bool changed = false;
  std::optional<v1::Progress> progress;
  JobChange change;
};

OpenAttempt OpenForSpool(SqliteConnection& c, const AttemptKey& key) {
  OpenAttempt out;
  absl::StatusOr<int64_t> job = job_table::NumberOf(c, key.job());
  if (!job.ok()) return out;
  out.job = *job;
  out.row = AttemptRowId(out.job, key.number());
  std::optional<job_table::SpoolPosition> position = job_table::FindSpoolPosition(c, out.row);
  if (!position) return out;
  out.known = true;
  out.position = *std::move(position);
  out.fixed[0] = out.position.cursor.metrics();
  out.fixed[1] = out.position.cursor.stdout_log();
  out.fixed[2] = out.position.cursor.stderr_log();
  out.change.job = key.job();
  return out;
}

}  // namespace

// The writer's cache lives beside the database, because the database's thread clears it.
class SqliteJobStore::WriterCaches {
 public:
  PointWriterCache points;
};

SqliteJobStore::SqliteJobStore(const Options& options) : options_(options), caches_(std::make_unique<WriterCaches>()) {}
SqliteJobStore::~SqliteJobStore() { database_.reset(); }

absl::StatusOr<std::unique_ptr<SqliteJobStore>> SqliteJobStore::Open(const Options& options) {
  std::unique_ptr<SqliteJobStore> store(new SqliteJobStore(options));
  SqliteDatabase::Options database;
  database.path = options.path;
  database.readers = options.readers;
  database.max_waiting_writes = options.max_waiting_writes;
  database.max_bytes = options.max_database_bytes;
  database.exclusive = options.exclusive;
  database.on_rollback = [caches = store->caches_.get()] { caches->points.Clear(); };
  ITWIN_ASSIGN_OR_RETURN(store->database_, SqliteDatabase::Open(database));
  if (options.exclusive) ITWIN_RETURN_IF_ERROR(Annotate(store->Verify(/*all=*/false), options.path));
  return store;
}

const std::string& SqliteJobStore::gateway_id() const { return database_->gateway_id(); }

SqliteJobStore::Statistics SqliteJobStore::statistics() const {
  return {database_->queue().writes(), database_->queue().commits()};
}

absl::Status SqliteJobStore::Verify(bool all) {
  return database_->Read([&](SqliteConnection& c) { return job_table::Verify(c, all); });
}

absl::Status SqliteJobStore::Backup(const std::string& path) { return database_->Backup(path); }

template <typename T, typename Body>
absl::StatusOr<T> SqliteJobStore::Read(const Body& body) {
  absl::StatusOr<T> out = absl::InternalError("not read");
  absl::Status status = database_->Read([&](SqliteConnection& c) {
    out = body(c);
    return out.status();
  });
  if (!status.ok()) return status;
  return out;
}

absl::StatusOr<Submitted> SqliteJobStore::Submit(const NewJob& job) {
  Submitted out;
  const std::string content = job_table::ContentSha256(job);
  ITWIN_RETURN_IF_ERROR(database_->Write([&](WriteContext& w) -> absl::Status {
    ITWIN_ASSIGN_OR_RETURN(out, job_table::Submit(w.connection, job, content, options_.max_live_jobs_per_owner));
    if (!out.existed) {
      w.changes.push_back({.job = out.job.id, .event = true, .row = std::make_shared<const JobRow>(out.job)});
    }
    return absl::OkStatus();
  }));
  return out;
}

absl::StatusOr<std::optional<JobRow>> SqliteJobStore::FindSubmitted(const NewJob& job) {
  return Read<std::optional<JobRow>>(
      [&](SqliteConnection& c) { return job_table::FindSubmitted(c, job, job_table::ContentSha256(job)); });
}

absl::StatusOr<JobRow> SqliteJobStore::AppendEvent(const JobId& job, const JobEvent& event,
                                                   const AttemptUpdate& update) {
  JobRow out;
  ITWIN_RETURN_IF_ERROR(database_->Write([&](WriteContext& w) -> absl::Status {
    ITWIN_ASSIGN_OR_RETURN(out, job_table::AppendEvent(w.connection, job, event, update));
    w.changes.push_back({.job = job,
                         .event = true,
                         .attempt = !update.empty(),
                         .progress = update.progress.has_value(),
                         .row = std::make_shared<const JobRow>(out)});
    return absl::OkStatus();
  }));
  return out;
}

absl::Status SqliteJobStore::UpdateAttempt(const AttemptKey& attempt, const AttemptUpdate& update) {
  return database_->Write([&](WriteContext& w) -> absl::Status {
    ITWIN_RETURN_IF_ERROR(job_table::UpdateAttempt(w.connection, attempt, update));
    w.changes.push_back({.job = attempt.job(), .attempt = true, .progress = update.progress.has_value()});
    return absl::OkStatus();
  });
}

absl::StatusOr<std::vector<SpoolCommit>> SqliteJobStore::CommitSpool(const std::vector<SpoolBatch>& batches) {
  std::vector<SpoolCommit> out;
  if (batches.empty()) return out;
  for (const SpoolBatch& batch : batches) {
    if (batch.end_offset < batch.begin_offset || batch.begin_offset < 0 ||
        batch.file == agent::v1::SPOOL_FILE_UNSPECIFIED) {
      return absl::InvalidArgumentError(absl::StrCat("a batch of attempt ", batch.attempt.text(),
                                                     " names no file or a range that ends before it begins"));
    }
  }
  ITWIN_RETURN_IF_ERROR(database_->Write([&](WriteContext& w) -> absl::Status {
    SqliteConnection& c = w.connection;
    PointWriter points(c, caches_->points);
    out.clear();
    absl::flat_hash_map<AttemptKey, OpenAttempt> attempts;
    for (const SpoolBatch& batch : batches) {
      auto [it, fresh] = attempts.try_emplace(batch.attempt);
      OpenAttempt& attempt = it->second;
      if (fresh) attempt = OpenForSpool(c, batch.attempt);
      if (!attempt.known) {
        out.push_back({.outcome = SpoolCommit::Outcome::kUnknownAttempt});
        continue;
      }
      int64_t* position = PositionOf(&attempt.position.cursor, batch, attempt.fixed);
      if (position == nullptr) return absl::InvalidArgumentError("a batch names a file that no spool has");
      if (*position != batch.begin_offset) {
        out.push_back({.outcome = SpoolCommit::Outcome::kSkipped, .cursor = *position});
        continue;
      }
      int64_t refused_points = 0;
      for (const PointColumns& columns : batch.points) {
        ITWIN_ASSIGN_OR_RETURN(const int64_t refused, points.Add(attempt.job, batch.attempt.number(), columns));
        refused_points += refused;
        attempt.change.points |= !columns.values.empty();
        if (batch.file != agent::v1::SPOOL_FILE_METRICS) continue;  // a monitor's points are no steps of the program
        for (const int64_t step : columns.steps) attempt.position.max_step = std::max(attempt.position.max_step, step);
      }
      if (!batch.log.empty()) {
        const bool is_stderr = batch.file == agent::v1::SPOOL_FILE_STDERR;
        log_table::Append(c, attempt.row, is_stderr ? v1::LOG_STREAM_STDERR : v1::LOG_STREAM_STDOUT, batch.log,
                          options_.log_mirror_bytes);
        attempt.change.logs = true;
      }
      if (batch.progress) {
        attempt.progress = batch.progress;
        attempt.position.max_step = std::max(attempt.position.max_step, batch.progress->step());
      }
      attempt.position.bad_lines += batch.bad_lines + refused_points;
      *position = batch.end_offset;
      attempt.changed = true;
      out.push_back({SpoolCommit::Outcome::kStored, batch.end_offset, refused_points});
    }
    for (auto& [key, attempt] : attempts) {
      if (!attempt.changed) continue;
      attempt.position.cursor.set_metrics(attempt.fixed[0]);
      attempt.position.cursor.set_stdout_log(attempt.fixed[1]);
      attempt.position.cursor.set_stderr_log(attempt.fixed[2]);
      job_table::SetSpoolPosition(c, attempt.row, attempt.position);
      if (attempt.progress) {
        job_table::SetProgress(c, attempt.job, key.number(), *attempt.progress);
        attempt.change.progress = true;
      }
      w.changes.push_back(attempt.change);
    }
    return absl::OkStatus();
  }));
  return out;
}

absl::StatusOr<int> SqliteJobStore::RemoveFinished(absl::Time before, int limit) {
  int removed = 0;
  while (removed < limit) {
    using Result = std::optional<int64_t>;
    ITWIN_ASSIGN_OR_RETURN(const Result num, Read<Result>([&](SqliteConnection& c) -> absl::StatusOr<Result> {
                             return job_table::FindFinishedBefore(c, before);
                           }));
    if (!num) break;
    ITWIN_RETURN_IF_ERROR(database_->Write([&](WriteContext& w) {
      job_table::RemoveFinished(w.connection, *num, before);
      caches_->points.Clear();  // the number may be given again
      return absl::OkStatus();
    }));
    ++removed;
  }
  return removed;
}

absl::StatusOr<std::string> SqliteJobStore::PinSpool(const std::string& site, const std::string& spool_id) {
  std::string out;
  ITWIN_RETURN_IF_ERROR(database_->Write([&](WriteContext& w) {
    out = site_table::PinSpool(w.connection, site, spool_id);
    return absl::OkStatus();
  }));
  return out;
}

absl::Status SqliteJobStore::ForgetSpool(const std::string& site) {
  return database_->Write([&](WriteContext& w) { return site_table::ForgetSpool(w.connection, site); });
}

absl::StatusOr<JobRow> SqliteJobStore::GetJob(const JobId& job) {
  return Read<JobRow>([&](SqliteConnection& c) -> absl::StatusOr<JobRow> {
    ITWIN_ASSIGN_OR_RETURN(job_table::NumberedJob found, job_table::Get(c, job));
    return std::move(found.row);
  });
}

absl::StatusOr<v1::JobSpec> SqliteJobStore::GetSpec(const JobId& job) {
  return Read<v1::JobSpec>([&](SqliteConnection& c) { return job_table::GetSpec(c, job); });
}

absl::StatusOr<JobId> SqliteJobStore::ResolveJob(absl::string_view prefix, absl::string_view owner) {
  return Read<JobId>([&](SqliteConnection& c) { return job_table::Resolve(c, prefix, owner); });
}

absl::StatusOr<JobPage> SqliteJobStore::ListJobs(const JobFilter& filter) {
  return Read<JobPage>([&](SqliteConnection& c) { return job_table::List(c, filter); });
}

absl::StatusOr<std::vector<JobRow>> SqliteJobStore::ListLive(absl::string_view site, int64_t after_version) {
  return Read<std::vector<JobRow>>([&](SqliteConnection& c) { return job_table::ListLive(c, site, after_version); });
}

absl::StatusOr<int64_t> SqliteJobStore::CountLive(absl::string_view owner) {
  return Read<int64_t>([&](SqliteConnection& c) -> absl::StatusOr<int64_t> { return job_table::CountLive(c, owner); });
}

absl::StatusOr<std::vector<AttemptRow>> SqliteJobStore::ListAttempts(const JobId& job) {
  return Read<std::vector<AttemptRow>>([&](SqliteConnection& c) { return job_table::ListAttempts(c, job); });
}

absl::StatusOr<AttemptRow> SqliteJobStore::GetAttempt(const AttemptKey& attempt) {
  return Read<AttemptRow>([&](SqliteConnection& c) { return job_table::GetAttempt(c, attempt); });
}

absl::StatusOr<std::vector<StoredEvent>> SqliteJobStore::ListEvents(const JobId& job, int64_t after_sequence,
                                                                    int limit) {
  return Read<std::vector<StoredEvent>>([&](SqliteConnection& c) {
    return job_table::ListEvents(c, job, after_sequence, std::clamp(limit, 1, kMaxEventsPerRead));
  });
}

absl::StatusOr<std::vector<v1::OutputFile>> SqliteJobStore::ListOutputs(const JobId& job) {
  return Read<std::vector<v1::OutputFile>>([&](SqliteConnection& c) { return job_table::ListOutputs(c, job); });
}

absl::StatusOr<PointsPage> SqliteJobStore::ListPoints(const JobId& job, int64_t cursor,
                                                      const std::vector<std::string>& patterns, int limit) {
  return Read<PointsPage>([&](SqliteConnection& c) -> absl::StatusOr<PointsPage> {
    ITWIN_ASSIGN_OR_RETURN(const int64_t num, job_table::NumberOf(c, job));
    return server::ListPoints(c, num, cursor, patterns, std::clamp(limit, 1, kMaxPointsPerRead));
  });
}

absl::StatusOr<std::vector<v1::SeriesBuckets>> SqliteJobStore::QuerySeries(const JobId& job,
                                                                           const std::vector<std::string>& patterns,
                                                                           int buckets) {
  using Result = std::vector<v1::SeriesBuckets>;
  return Read<Result>([&](SqliteConnection& c) -> absl::StatusOr<Result> {
    ITWIN_ASSIGN_OR_RETURN(const int64_t num, job_table::NumberOf(c, job));
    return server::QuerySeries(c, num, patterns, std::clamp(buckets, 1, kMaxBuckets));
  });
}

absl::StatusOr<LogSlice> SqliteJobStore::ReadLog(const JobId& job, int attempt, v1::LogStream stream, int64_t offset,
                                                 int limit) {
  return Read<LogSlice>([&](SqliteConnection& c) -> absl::StatusOr<LogSlice> {
    ITWIN_ASSIGN_OR_RETURN(const job_table::NumberedJob found, job_table::Get(c, job));
    const JobRecord& record = found.row.record;
    const int number = attempt == 0 ? record.attempt : attempt;
    if (number == 0) {
      return absl::NotFoundError(absl::StrCat("job ", job.text(), " has no log yet: it is ", Name(record.state)));
    }
    ITWIN_ASSIGN_OR_RETURN(const AttemptRow row, job_table::GetAttempt(c, AttemptKey(job, number)));
    const bool is_stderr = stream == v1::LOG_STREAM_STDERR;
    LogSlice out = log_table::Read(c, AttemptRowId(found.num, number),
                                   is_stderr ? v1::LOG_STREAM_STDERR : v1::LOG_STREAM_STDOUT, offset,
                                   std::clamp(limit, 1, kMaxLogBytesPerRead));
    out.attempt = number;
    // All of the file is here; or nothing more can come.
    const int64_t stored = is_stderr ? row.cursor.stderr_log() : row.cursor.stdout_log();
    const bool all = row.final_sizes &&
                     stored >= (is_stderr ? row.final_sizes->stderr_log() : row.final_sizes->stdout_log());
    if (row.final_sizes) {  // what the site itself did not keep
      out.dropped_bytes += is_stderr ? row.final_sizes->stderr_dropped() : row.final_sizes->stdout_dropped();
    }
    out.complete = all || number < record.attempt || IsFinal(record.state);
    return out;
  });
}

void SqliteJobStore::AddListener(CommitListener* listener) { database_->AddListener(listener); }
void SqliteJobStore::RemoveListener(CommitListener* listener) { database_->RemoveListener(listener); }

absl::Status SqliteJobStore::AddToken(const TokenRow& token) {
  return database_->Write([&](WriteContext& w) { return token_table::Add(w.connection, token); });
}

absl::StatusOr<std::optional<TokenRow>> SqliteJobStore::FindToken(absl::string_view sha256) {
  using Result = std::optional<TokenRow>;
  return Read<Result>([&](SqliteConnection& c) -> absl::StatusOr<Result> { return token_table::Find(c, sha256); });
}

absl::Status SqliteJobStore::RevokeToken(absl::string_view name) {
  return database_->Write([&](WriteContext& w) { return token_table::Revoke(w.connection, name); });
}

absl::StatusOr<std::vector<TokenRow>> SqliteJobStore::ListTokens() {
  using Result = std::vector<TokenRow>;
  return Read<Result>([&](SqliteConnection& c) -> absl::StatusOr<Result> { return token_table::List(c); });
}

}  // namespace itwin::server

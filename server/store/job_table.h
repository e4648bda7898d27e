#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/store/job_rows.h"
#include "server/store/sqlite_connection.h"

// Jobs, events, attempts and outputs on a connection whose transaction is the caller's. Everything here may throw what
// SQLiteCpp throws: the caller is inside SqliteConnection::Guard.
namespace itwin::server::job_table {

struct NumberedJob {
  int64_t num = 0;
  JobRow row;
};

absl::StatusOr<int64_t> NumberOf(SqliteConnection& c, const JobId& job);  // kNotFound
absl::StatusOr<NumberedJob> Get(SqliteConnection& c, const JobId& job);   // kNotFound
absl::StatusOr<v1::JobSpec> GetSpec(SqliteConnection& c, const JobId& job);
absl::StatusOr<JobId> Resolve(SqliteConnection& c, absl::string_view prefix, absl::string_view owner);
absl::StatusOr<JobPage> List(SqliteConnection& c, const JobFilter& filter);
absl::StatusOr<std::vector<JobRow>> ListLive(SqliteConnection& c, absl::string_view site, int64_t after_version);
int64_t CountLive(SqliteConnection& c, absl::string_view owner);

// Of a submission, whatever the order of its maps.
std::string ContentSha256(const NewJob& job);
absl::StatusOr<std::optional<JobRow>> FindSubmitted(SqliteConnection& c, const NewJob& job,
                                                    const std::string& content_sha256);
absl::StatusOr<Submitted> Submit(SqliteConnection& c, const NewJob& job, const std::string& content_sha256,
                                 int64_t max_live_per_owner);
absl::StatusOr<JobRow> AppendEvent(SqliteConnection& c, const JobId& job, JobEvent event, const AttemptUpdate& update);
absl::Status UpdateAttempt(SqliteConnection& c, const AttemptKey& attempt, const AttemptUpdate& update);
// Nothing happens unless `attempt` is the newest.
void SetProgress(SqliteConnection& c, int64_t num, int attempt, const v1::Progress& progress);

absl::StatusOr<std::vector<AttemptRow>> ListAttempts(SqliteConnection& c, const JobId& job);
absl::StatusOr<AttemptRow> GetAttempt(SqliteConnection& c, const AttemptKey& attempt);
absl::StatusOr<std::vector<StoredEvent>> ListEvents(SqliteConnection& c, const JobId& job, int64_t after_sequence,
                                                    int limit);
absl::StatusOr<std::vector<v1::OutputFile>> ListOutputs(SqliteConnection& c, const JobId& job);

// How far the spool of an attempt is stored.
struct SpoolPosition {
  agent::v1::SpoolCursor cursor;
  int64_t max_step = 0;
  int64_t bad_lines = 0;
};
std::optional<SpoolPosition> FindSpoolPosition(SqliteConnection& c, int64_t attempt_row);
void SetSpoolPosition(SqliteConnection& c, int64_t attempt_row, const SpoolPosition& position);

// Removes a finished job that ended before `before`, the oldest first, with everything that is stored of it. False: there is
// none. Found with a reader, removed with the writer, so that the search holds nobody up.
std::optional<int64_t> FindFinishedBefore(SqliteConnection& c, absl::Time before);
bool RemoveFinished(SqliteConnection& c, int64_t num, absl::Time before);

absl::Status Verify(SqliteConnection& c, bool all);

}  // namespace itwin::server::job_table

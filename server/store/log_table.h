#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/store/job_rows.h"
#include "server/store/sqlite_connection.h"

// The mirror of what programs print: the first part of each stream, in chunks, and a count of the rest. Statements
// throw as in job_table.h.
namespace itwin::server::log_table {

// Appends what fits below `limit` bytes; the first time that something does not fit, a sentence says so.
void Append(SqliteConnection& c, int64_t attempt_row, v1::LogStream stream, absl::string_view bytes, int64_t limit);
// Offsets as in JobStore::ReadLog; `attempt` and `complete` are left to the caller.
LogSlice Read(SqliteConnection& c, int64_t attempt_row, v1::LogStream stream, int64_t offset, int limit);

}  // namespace itwin::server::log_table

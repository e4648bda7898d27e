#include "server/store/sqlite_connection.h"

#include <SQLiteCpp/Backup.h>
#include <SQLiteCpp/Database.h>
#include <SQLiteCpp/Exception.h>
#include <SQLiteCpp/Statement.h>
#include <fcntl.h>
#include <sqlite3.h>

#include <cerrno>
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

absl::Status StatusOf(int code, int system_error, absl::string_view message) {
  switch (code & 0xff) {
    case SQLITE_FULL:
      return absl::ResourceExhaustedError(
          absl::StrCat("the disk (or the limit set for the database) is full; make room and try again: ", message));
    case SQLITE_IOERR:
      if (system_error == ENOSPC || system_error == EDQUOT || system_error == EFBIG) {
        return absl::ResourceExhaustedError(
            absl::StrCat("the disk that holds the database is full; make room and try again: ", message));
      }
      return absl::UnavailableError(absl::StrCat("the database's disk answers with an error: ", message));
    case SQLITE_CANTOPEN:
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
    case SQLITE_NOMEM:
    case SQLITE_INTERRUPT:
      return absl::UnavailableError(absl::StrCat("the database cannot be used now: ", message));
    case SQLITE_PERM:
    case SQLITE_READONLY:
    case SQLITE_AUTH:
      return absl::PermissionDeniedError(absl::StrCat("the database may not be written: ", message));
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
    case SQLITE_FORMAT:
      return absl::DataLossError(absl::StrCat("the database file is damaged or not a database: ", message));
    case SQLITE_TOOBIG:
      return absl::InvalidArgumentError(absl::StrCat("too large for one row: ", message));
    default:
      return absl::InternalError(absl::StrCat("database: ", message, " (", code, ")"));
  }
}

// Why the last operation on one of the connection's files failed; sqlite3_system_errno has been overwritten by the
// clean-up by the time an error is caught.
int LastErrno(sqlite3* handle) {
  for (const int which : {SQLITE_FCNTL_JOURNAL_POINTER, SQLITE_FCNTL_FILE_POINTER}) {
    sqlite3_file* file = nullptr;
    int error = 0;
    if (sqlite3_file_control(handle, "main", which, &file) == SQLITE_OK && file != nullptr && file->pMethods != nullptr &&
        file->pMethods->xFileControl(file, SQLITE_FCNTL_LAST_ERRNO, &error) == SQLITE_OK && error != 0) {
      return error;
    }
  }
  return sqlite3_system_errno(handle);
}

}  // namespace

SqliteConnection::SqliteConnection(std::unique_ptr<SQLite::Database> database) : database_(std::move(database)) {}
SqliteConnection::~SqliteConnection() = default;

absl::StatusOr<std::unique_ptr<SqliteConnection>> SqliteConnection::Open(const std::string& path, Mode mode) {
  try {
    const int flags = mode == Mode::kReadOnly ? SQLite::OPEN_READONLY : SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE;
    // Waits for a moment for locks: recovery and checkpoints take some for short.
    auto database = std::make_unique<SQLite::Database>(path, flags | SQLite::OPEN_NOMUTEX, /*aBusyTimeoutMs=*/5000);
    return std::unique_ptr<SqliteConnection>(new SqliteConnection(std::move(database)));
  } catch (const SQLite::Exception& e) {
    return Annotate(StatusOf(e.getErrorCode(), errno, e.what()), path);
  }
}

absl::Status SqliteConnection::Guard(absl::FunctionRef<absl::Status()> body) {
  try {
    return body();
  } catch (const SQLite::Exception& e) {
    return StatusOf(e.getErrorCode(), LastErrno(database_->getHandle()), e.what());
  }
}

void SqliteConnection::Run(const char* sql) { database_->exec(sql); }
bool SqliteConnection::autocommit() const { return sqlite3_get_autocommit(database_->getHandle()) != 0; }
int64_t SqliteConnection::last_insert_rowid() const { return database_->getLastInsertRowid(); }
int64_t SqliteConnection::total_changes() const { return sqlite3_total_changes64(database_->getHandle()); }
int SqliteConnection::changes() const { return sqlite3_changes(database_->getHandle()); }

absl::Status SqliteConnection::BackupTo(const std::string& path) {
  // Ours and private before SQLite writes the first byte.
  ITWIN_RETURN_IF_ERROR(OpenFile(path, O_WRONLY | O_CREAT | O_EXCL, 0600).status());
  return Guard([&]() -> absl::Status {
    SQLite::Database copy(path, SQLite::OPEN_READWRITE);
    SQLite::Backup backup(copy, *database_);
    const int code = backup.executeStep(-1);
    if (code != SQLITE_DONE) return StatusOf(code, errno, "backup did not end");
    return absl::OkStatus();
  });
}

SQLite::Statement& SqliteConnection::Prepared(const char* sql) {
  std::unique_ptr<SQLite::Statement>& statement = statements_[sql];
  if (statement == nullptr) {
    try {
      statement = std::make_unique<SQLite::Statement>(*database_, sql);
    } catch (...) {
      statements_.erase(sql);
      throw;
    }
  }
  return *statement;
}

Query::~Query() {
  statement_.tryReset();
  // Borrowed bytes must not be seen after this use. No statement leaves a value unbound, so nothing else is cleared.
}

bool Query::Step() { return statement_.executeStep(); }
void Query::Run() {
  while (statement_.executeStep()) {
  }
}

int64_t Query::Int(int column) const { return statement_.getColumn(column).getInt64(); }
double Query::Double(int column) const {
  const SQLite::Column value = statement_.getColumn(column);
  return value.isNull() ? std::numeric_limits<double>::quiet_NaN() : value.getDouble();
}
bool Query::IsNull(int column) const { return statement_.isColumnNull(column); }
std::string Query::Text(int column) const { return statement_.getColumn(column).getString(); }
absl::string_view Query::Bytes(int column) const {
  const SQLite::Column value = statement_.getColumn(column);
  const void* bytes = value.getBlob();
  return absl::string_view(static_cast<const char*>(bytes), static_cast<size_t>(value.getBytes()));
}

void Query::Bind(int index, int64_t value) { statement_.bind(index, value); }
void Query::Bind(int index, double value) { statement_.bind(index, value); }
void Query::Bind(int index, const std::string& value) { statement_.bind(index, value); }
void Query::Bind(int index, Borrowed value) {
  // A null pointer would bind NULL.
  statement_.bindNoCopy(index, value.bytes.empty() ? "" : value.bytes.data(), static_cast<int>(value.bytes.size()));
}
void Query::Bind(int index, Null) { statement_.bind(index); }

}  // namespace itwin::server

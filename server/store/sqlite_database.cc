#include "server/store/sqlite_database.h"

#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "common/ids.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "server/store/migrations.h"

namespace itwin::server {
namespace {

// Marks the file as ours, so that a foreign database is not migrated by mistake. "itwn".
constexpr int64_t kApplicationId = 0x6974776e;
constexpr int64_t kPageBytes = 4096;

// 64 MiB of log between checkpoints (a page that many jobs share is then copied back once for many commits); 64 MiB of
// cache for the writer. Temporary things stay in memory: a full /tmp must
// not hurt.
constexpr char kWriterPragmas[] =
    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 16000;"
    "PRAGMA journal_size_limit = 134217728; PRAGMA cache_size = -65536; PRAGMA temp_store = MEMORY;"
    "PRAGMA foreign_keys = OFF; PRAGMA trusted_schema = OFF;";
constexpr char kReaderPragmas[] =
    "PRAGMA query_only = ON; PRAGMA cache_size = -8192; PRAGMA temp_store = MEMORY; PRAGMA trusted_schema = OFF;";
constexpr char kGetApplicationId[] = "PRAGMA application_id";
constexpr char kGetVersion[] = "PRAGMA user_version";
constexpr char kCountTables[] = "SELECT count(*) FROM sqlite_schema";
constexpr char kGetGatewayId[] = "SELECT value FROM meta WHERE key = 'gateway_id'";
constexpr char kSetGatewayId[] = "INSERT INTO meta (key, value) VALUES ('gateway_id', ?)";
constexpr char kBegin[] = "BEGIN";
constexpr char kBeginExclusive[] = "BEGIN EXCLUSIVE";
constexpr char kCommit[] = "COMMIT";
constexpr char kRollback[] = "ROLLBACK";

int64_t GetInt(SqliteConnection& connection, const char* sql) {
  Query query(connection, sql);
  return query.Step() ? query.Int(0) : 0;
}

absl::Status Migrate(SqliteConnection& connection, const std::string& path) {
  const int64_t version = GetInt(connection, kGetVersion);
  const int64_t newest = Migrations().back().version;
  if (version > newest) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " has schema ", version, ", made by a newer itwin-gateway; this one knows schemas up to ",
                     newest, ". Install the newer program, or restore a copy made by this one"));
  }
  if (GetInt(connection, kGetApplicationId) != kApplicationId && (version != 0 || GetInt(connection, kCountTables) != 0)) {
    return absl::DataLossError(absl::StrCat(path, " is a database of another program; name another data directory"));
  }
  for (const Migration& migration : Migrations()) {
    if (migration.version <= version) continue;
    connection.Run(kBeginExclusive);
    absl::Cleanup rollback = [&] { connection.Guard([&] { connection.Run(kRollback); return absl::OkStatus(); }).IgnoreError(); };
    connection.Run(migration.sql);
    connection.Run(absl::StrCat("PRAGMA application_id = ", kApplicationId, "; PRAGMA user_version = ",
                                migration.version).c_str());
    if (migration.version == 1) Query(connection, kSetGatewayId, RandomHex(8)).Run();
    connection.Run(kCommit);
    std::move(rollback).Cancel();
    log::Info("database {}: schema {}", path, migration.version);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<SqliteDatabase>> SqliteDatabase::Open(const Options& options) {
  std::unique_ptr<SqliteDatabase> database(new SqliteDatabase(options));
  ITWIN_RETURN_IF_ERROR(database->Prepare());
  return database;
}

absl::Status SqliteDatabase::Prepare() {
  // SQLite would allow a second process; two dispatchers over one database would not be right.
  const std::string lock_path = options_.path + ".lock";
  ITWIN_ASSIGN_OR_RETURN(lock_, OpenFile(lock_path, O_RDWR | O_CREAT, 0600));
  if (options_.exclusive && flock(lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return ErrnoStatus(errno, lock_path);
    return absl::FailedPreconditionError(
        absl::StrCat(options_.path, " is in use by another itwin-gateway; stop that one first"));
  }
  // 0600 before SQLite makes it; the -wal and -shm files take over its mode.
  ITWIN_RETURN_IF_ERROR(OpenFile(options_.path, O_RDWR | O_CREAT, 0600).status());
  ITWIN_ASSIGN_OR_RETURN(writer_, SqliteConnection::Open(options_.path, SqliteConnection::Mode::kReadWrite));
  const absl::Status prepared = writer_->Guard([&]() -> absl::Status {
    writer_->Run(kWriterPragmas);
    ITWIN_RETURN_IF_ERROR(Migrate(*writer_, options_.path));
    if (options_.max_bytes > 0) {
      writer_->Run(absl::StrCat("PRAGMA max_page_count = ", std::max<int64_t>(1, options_.max_bytes / kPageBytes)).c_str());
    }
    Query query(*writer_, kGetGatewayId);
    if (!query.Step()) return absl::DataLossError("the table meta has no gateway_id");
    gateway_id_ = query.Text(0);
    return absl::OkStatus();
  });
  ITWIN_RETURN_IF_ERROR(prepared);
  for (int i = 0; i < options_.readers; ++i) {
    ITWIN_ASSIGN_OR_RETURN(std::unique_ptr<SqliteConnection> reader,
                           SqliteConnection::Open(options_.path, SqliteConnection::Mode::kReadOnly));
    ITWIN_RETURN_IF_ERROR(reader->Guard([&] {
      reader->Run(kReaderPragmas);
      return absl::OkStatus();
    }));
    absl::MutexLock lock(&mu_);
    free_readers_.push_back(std::move(reader));
  }
  CommitQueue::Hooks hooks;
  hooks.on_rollback = options_.on_rollback;
  hooks.on_commit = [this](absl::Span<const JobChange> changes) {
    absl::MutexLock lock(&listeners_mu_);
    for (CommitListener* listener : listeners_) listener->OnCommit(changes);
  };
  queue_ = std::make_unique<CommitQueue>(writer_.get(), options_.max_waiting_writes, std::move(hooks));
  return absl::OkStatus();
}

SqliteDatabase::~SqliteDatabase() {
  queue_.reset();
  // The writer goes last and so folds the log into the file.
  absl::MutexLock lock(&mu_);
  free_readers_.clear();
}

absl::Status SqliteDatabase::Read(absl::FunctionRef<absl::Status(SqliteConnection&)> body) {
  std::unique_ptr<SqliteConnection> connection;
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &SqliteDatabase::HasReader));
    connection = std::move(free_readers_.back());
    free_readers_.pop_back();
  }
  absl::Status status = connection->Guard([&]() -> absl::Status {
    Query(*connection, kBegin).Run();
    return body(*connection);
  });
  if (!connection->autocommit()) {
    absl::Status end = connection->Guard([&] {
      Query(*connection, kRollback).Run();
      return absl::OkStatus();
    });
    if (status.ok()) status = end;
  }
  absl::MutexLock lock(&mu_);
  free_readers_.push_back(std::move(connection));
  return status;
}

absl::Status SqliteDatabase::Backup(const std::string& path) {
  // A connection of its own: a copy takes long, and the pool is for short reads.
  ITWIN_ASSIGN_OR_RETURN(std::unique_ptr<SqliteConnection> connection,
                         SqliteConnection::Open(options_.path, SqliteConnection::Mode::kReadOnly));
  return Annotate(connection->BackupTo(path), "backup");
}

void SqliteDatabase::AddListener(CommitListener* listener) {
  absl::MutexLock lock(&listeners_mu_);
  listeners_.push_back(listener);
}

void SqliteDatabase::RemoveListener(CommitListener* listener) {
  absl::MutexLock lock(&listeners_mu_);
  listeners_.erase(std::remove(listeners_.begin(), listeners_.end(), listener), listeners_.end());
}

}  // namespace itwin::server

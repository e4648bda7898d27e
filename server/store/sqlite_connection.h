#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace SQLite {
class Database;
class Statement;
}  // namespace SQLite

namespace itwin::server {

// One connection and its prepared statements. One thread at a time.
// Query and Run throw what SQLiteCpp throws; every use runs inside Guard, which makes a Status of it.
class SqliteConnection {
 public:
  enum class Mode { kReadWrite, kReadOnly };
  // kDataLoss when the file is no database, kUnavailable or kPermissionDenied when it cannot be opened.
  static absl::StatusOr<std::unique_ptr<SqliteConnection>> Open(const std::string& path, Mode mode);
  ~SqliteConnection();

  absl::Status Guard(absl::FunctionRef<absl::Status()> body);
  // A constant statement list, without results.
  void Run(const char* sql);
  // No transaction is open (any more: SQLite ends it by itself on some errors).
  bool autocommit() const;
  int64_t last_insert_rowid() const;
  int changes() const;  // rows of the last statement
  int64_t total_changes() const;  // rows of all statements so far
  // Copies the whole database into a new file.
  absl::Status BackupTo(const std::string& path);

 private:
  friend class Query;
  explicit SqliteConnection(std::unique_ptr<SQLite::Database> database);
  SQLite::Statement& Prepared(const char* sql);

  std::unique_ptr<SQLite::Database> database_;
  // By address: statements are constants.
  absl::flat_hash_map<const char*, std::unique_ptr<SQLite::Statement>> statements_;
};

// Bytes that are bound without a copy: they must outlive the statement's steps.
struct Borrowed {
  absl::string_view bytes;
};

// One use of a prepared statement; reset at the end. `sql` must be a constant.
class Query {
 public:
  template <typename... Values>
  Query(SqliteConnection& connection, const char* sql, const Values&... values)
      : statement_(connection.Prepared(sql)) {
    int index = 0;
    (Bind(++index, values), ...);
  }
  ~Query();
  Query(const Query&) = delete;
  Query& operator=(const Query&) = delete;

  bool Step();  // whether there is a row
  void Run();   // to the end

  int64_t Int(int column) const;
  double Double(int column) const;  // NULL: NaN, which SQLite stores so
  bool IsNull(int column) const;
  std::string Text(int column) const;
  absl::string_view Bytes(int column) const;  // until the next step

  struct Null {};
  void Bind(int index, int64_t value);
  void Bind(int index, int value) { Bind(index, int64_t{value}); }
  void Bind(int index, bool value) { Bind(index, int64_t{value}); }
  void Bind(int index, double value);
  void Bind(int index, const std::string& value);  // text, copied
  void Bind(int index, absl::string_view value) { Bind(index, std::string(value)); }
  void Bind(int index, const char* value) { Bind(index, std::string(value)); }
  void Bind(int index, Borrowed value);  // blob
  void Bind(int index, Null value);

 private:
  SQLite::Statement& statement_;
};

}  // namespace itwin::server

#pragma once

#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/store/sqlite_connection.h"
#include "server/store/token_store.h"

// Rows of TokenStore. Statements throw as in job_table.h.
namespace itwin::server::token_table {

absl::Status Add(SqliteConnection& c, const TokenRow& token);
std::optional<TokenRow> Find(SqliteConnection& c, absl::string_view sha256);
absl::Status Revoke(SqliteConnection& c, absl::string_view name);
std::vector<TokenRow> List(SqliteConnection& c);

}  // namespace itwin::server::token_table

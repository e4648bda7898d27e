#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/store/sqlite_connection.h"

// What is remembered of sites. Statements throw as in job_table.h.
namespace itwin::server::site_table {

// Returns the spool that is known for the site: the given one when there was none.
std::string PinSpool(SqliteConnection& c, absl::string_view site, absl::string_view spool_id);
// kNotFound.
absl::Status ForgetSpool(SqliteConnection& c, absl::string_view site);

}  // namespace itwin::server::site_table

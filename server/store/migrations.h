#pragma once

#include <vector>

namespace itwin::server {

// migrations/NNNN.sql, in order; `version` is NNNN and becomes the database's user_version.
struct Migration {
  int version;
  const char* sql;
};
const std::vector<Migration>& Migrations();

}  // namespace itwin::server

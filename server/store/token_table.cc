#include "server/store/token_table.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/sha256.h"

namespace itwin::server::token_table {
namespace {

constexpr size_t kMaxNameBytes = 63;

constexpr char kInsert[] =
    "INSERT OR IGNORE INTO tokens (name, sha256, role, created_us, revoked_us) VALUES (?, ?, ?, ?, 0)";
constexpr char kFind[] = "SELECT name, sha256, role, created_us, revoked_us FROM tokens WHERE sha256 = ?";
constexpr char kList[] = "SELECT name, sha256, role, created_us, revoked_us FROM tokens ORDER BY name";
constexpr char kFindName[] = "SELECT 1 FROM tokens WHERE name = ?";
constexpr char kRevoke[] = "UPDATE tokens SET revoked_us = ? WHERE name = ? AND revoked_us = 0";

TokenRow ReadToken(const Query& q) {
  TokenRow row;
  row.name = q.Text(0);
  row.sha256 = q.Text(1);
  row.role = static_cast<TokenRole>(q.Int(2));
  row.created = absl::FromUnixMicros(q.Int(3));
  if (q.Int(4) != 0) row.revoked = absl::FromUnixMicros(q.Int(4));
  return row;
}

}  // namespace

absl::Status Add(SqliteConnection& c, const TokenRow& token) {
  const bool good = !token.name.empty() && token.name.size() <= kMaxNameBytes &&
                    std::all_of(token.name.begin(), token.name.end(), [](char ch) {
                      return absl::ascii_isalnum(static_cast<unsigned char>(ch)) || ch == '.' || ch == '_' || ch == '@' ||
                             ch == '-';
                    });
  if (!good) {
    return absl::InvalidArgumentError(absl::StrCat("token name '", absl::CHexEscape(token.name.substr(0, 80)),
                                                   "': use 1 to ", kMaxNameBytes, " letters, digits, '.', '_', '@', '-'"));
  }
  if (!IsSha256Hex(token.sha256)) return absl::InvalidArgumentError("a token is stored by its SHA-256, 64 hex digits");
  const absl::Time created = token.created == absl::Time() ? absl::Now() : token.created;
  Query(c, kInsert, token.name, token.sha256, static_cast<int>(token.role), absl::ToUnixMicros(created)).Run();
  if (c.changes() == 0) {
    return absl::AlreadyExistsError(absl::StrCat("a token named '", token.name, "' exists; choose another name"));
  }
  return absl::OkStatus();
}

std::optional<TokenRow> Find(SqliteConnection& c, absl::string_view sha256) {
  Query q(c, kFind, sha256);
  if (!q.Step()) return std::nullopt;
  return ReadToken(q);
}

absl::Status Revoke(SqliteConnection& c, absl::string_view name) {
  if (Query q(c, kFindName, name); !q.Step()) {
    return absl::NotFoundError(absl::StrCat("there is no token named '", absl::CHexEscape(name.substr(0, 80)), "'"));
  }
  Query(c, kRevoke, absl::ToUnixMicros(absl::Now()), name).Run();
  return absl::OkStatus();
}

std::vector<TokenRow> List(SqliteConnection& c) {
  std::vector<TokenRow> out;
  Query q(c, kList);
  while (q.Step()) out.push_back(ReadToken(q));
  return out;
}

}  // namespace itwin::server::token_table

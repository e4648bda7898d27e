#include "server/store/site_table.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace itwin::server::site_table {
namespace {

constexpr char kInsertSpool[] = "INSERT OR IGNORE INTO site_spools (site, spool_id) VALUES (?, ?)";
constexpr char kGetSpool[] = "SELECT spool_id FROM site_spools WHERE site = ?";
constexpr char kDeleteSpool[] = "DELETE FROM site_spools WHERE site = ?";

}  // namespace

std::string PinSpool(SqliteConnection& c, absl::string_view site, absl::string_view spool_id) {
  Query(c, kInsertSpool, site, spool_id).Run();
  Query q(c, kGetSpool, site);
  return q.Step() ? q.Text(0) : std::string();
}

absl::Status ForgetSpool(SqliteConnection& c, absl::string_view site) {
  Query(c, kDeleteSpool, site).Run();
  if (c.changes() > 0) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("no spool is known of a site '", absl::CHexEscape(site.substr(0, 80)), "'"));
}

}  // namespace itwin::server::site_table

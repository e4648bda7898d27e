#include "client/cli/commands/commands.h"
#include "common/status_macros.h"

namespace itwin::cli {

absl::StatusOr<int> Sites(Session& session) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(std::vector<v1::Site> sites, gateway.Sites());
  session.output().Sites(sites);
  return kOk;
}

}  // namespace itwin::cli

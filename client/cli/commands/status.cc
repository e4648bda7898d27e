#include "client/cli/commands/commands.h"
#include "common/status_macros.h"

namespace itwin::cli {

absl::StatusOr<int> Status(Session& session, const std::string& job) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(v1::Job found, gateway.Get(job));
  session.output().Job(found);
  return kOk;
}

}  // namespace itwin::cli

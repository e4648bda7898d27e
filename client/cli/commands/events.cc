#include "client/cli/commands/commands.h"
#include "common/status_macros.h"

namespace itwin::cli {

absl::StatusOr<int> Events(Session& session, const std::string& job) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(std::vector<v1::JobEvent> events, gateway.Events(job));
  session.output().Events(events);
  return kOk;
}

}  // namespace itwin::cli

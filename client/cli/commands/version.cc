#include "client/cli/commands/commands.h"
#include "common/status_macros.h"

namespace itwin::cli {

absl::StatusOr<int> Version(Session& session) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(v1::GetVersionResponse version, gateway.Version());
  session.output().Version(version);
  return kOk;
}

}  // namespace itwin::cli

#include "client/cli/commands/commands.h"
#include "client/cli/watch_job.h"
#include "common/status_macros.h"

namespace itwin::cli {

absl::StatusOr<int> Retry(Session& session, const RetryArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(v1::SubmitJobResponse response, gateway.Retry(arguments.job, arguments.fresh));
  session.output().Submitted(response);
  if (!arguments.watch) return kOk;
  return WatchJob(session, response.job().id());
}

}  // namespace itwin::cli

#include "absl/strings/str_cat.h"
#include "client/cli/commands/commands.h"
#include "common/status_macros.h"

namespace itwin::cli {

// All of them are tried; the first error gives the exit code.
absl::StatusOr<int> Cancel(Session& session, const CancelArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  std::vector<CancelResult> results;
  int code = kOk;
  for (const std::string& job : arguments.jobs) {
    absl::StatusOr<v1::Job> after = gateway.Cancel(job, arguments.reason);
    results.push_back({.job = job, .status = after.status(), .after = after.ok() ? *after : v1::Job()});
    if (!after.ok() && code == kOk) code = ExitCodeOf(after.status());
  }
  session.output().Cancelled(results);
  for (const CancelResult& result : results) {
    if (result.status.ok() || session.json()) continue;
    session.output().Error(absl::Status(result.status.code(), absl::StrCat("cancel ", result.job, ": ", result.status.message())));
  }
  return code;
}

}  // namespace itwin::cli

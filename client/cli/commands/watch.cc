#include "client/cli/commands/commands.h"
#include "client/cli/watch_job.h"

namespace itwin::cli {

absl::StatusOr<int> Watch(Session& session, const std::string& job) { return WatchJob(session, job); }

}  // namespace itwin::cli

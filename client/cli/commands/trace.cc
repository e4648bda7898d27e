#include "absl/strings/str_cat.h"
#include "client/cli/commands/commands.h"
#include "client/cli/transfer_bar.h"
#include "common/status_macros.h"

namespace itwin::cli {

absl::StatusOr<int> Trace(Session& session, const TraceArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(const v1::Job job, gateway.Get(arguments.job));
  if (session.terminal().err_is_terminal) {
    *session.terminal().err << "itwin: asking for a trace of the next " << arguments.steps << " steps of job " << job.id()
                            << "; Ctrl-C stops the waiting, the trace will be among the outputs" << std::endl;
  }
  ITWIN_ASSIGN_OR_RETURN(const v1::OutputFile file, gateway.Trace(job.id(), arguments.steps));
  const std::string path = arguments.file.empty() ? absl::StrCat(job.id(), "-", file.path()) : arguments.file;
  TransferBar bar(session.terminal());
  ITWIN_RETURN_IF_ERROR(
      gateway.Download(file, path, [&](const client::TransferProgress& progress) { bar.Show(progress); }));
  bar.Clear();
  session.output().Traced({file, path});
  return kOk;
}

}  // namespace itwin::cli

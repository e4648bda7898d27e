#include "client/cli/commands/commands.h"
#include "client/cli/job_file.h"
#include "client/cli/transfer_bar.h"
#include "client/cli/watch_job.h"
#include "common/files.h"
#include "common/status_macros.h"

namespace itwin::cli {

absl::StatusOr<int> Submit(Session& session, const SubmitArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(JobFile file, ReadJobFile(arguments.file));
  ITWIN_ASSIGN_OR_RETURN(v1::JobSpec spec, ParseJobFile(file, arguments.file, arguments.overrides));
  if (!arguments.name.empty()) spec.set_name(arguments.name);
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  TransferBar bar(session.terminal());
  absl::StatusOr<v1::SubmitJobResponse> response =
      gateway.Submit(std::move(spec), {.base_directory = file.base_directory,
                                       .request_id = arguments.request_id,
                                       .progress = [&](const client::TransferProgress& progress) { bar.Show(progress); }});
  bar.Clear();
  ITWIN_RETURN_IF_ERROR(response.status());
  if (!arguments.id_file.empty()) {
    ITWIN_RETURN_IF_ERROR(WriteFileAtomically(arguments.id_file, response->job().id() + "\n", 0644));
  }
  session.output().Submitted(*response);
  if (!arguments.watch) return kOk;
  return WatchJob(session, response->job().id());
}

}  // namespace itwin::cli

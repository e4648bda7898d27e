#include <algorithm>

#include "absl/strings/str_cat.h"
#include "client/cli/commands/commands.h"
#include "client/cli/render.h"
#include "client/cli/transfer_bar.h"
#include "common/spec/nearest_name.h"
#include "common/status_macros.h"

namespace itwin::cli {
namespace {

absl::StatusOr<std::vector<v1::OutputFile>> Chosen(std::vector<v1::OutputFile> all, const std::vector<std::string>& names) {
  if (names.empty()) return all;
  std::vector<std::string> known;
  for (const v1::OutputFile& file : all) known.push_back(file.path());
  std::vector<v1::OutputFile> out;
  for (const std::string& name : names) {
    const auto at = std::find(known.begin(), known.end(), name);
    if (at == known.end()) {
      return absl::NotFoundError(absl::StrCat("the job has no output '", name, "'; ", UnknownNameHint(name, known)));
    }
    out.push_back(all[static_cast<size_t>(at - known.begin())]);
  }
  return out;
}

}  // namespace

absl::StatusOr<int> Get(Session& session, const GetArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(v1::Job job, gateway.Get(arguments.job));
  ITWIN_ASSIGN_OR_RETURN(std::vector<v1::OutputFile> files, gateway.Outputs(job.id()));
  if (files.empty() && job.finished_us() == 0) {
    return absl::FailedPreconditionError(absl::StrCat("job ", job.id(), " is ", StateText(job.state()),
                                                      "; outputs come when it has ended (itwin watch ", job.id(), ")"));
  }
  ITWIN_ASSIGN_OR_RETURN(files, Chosen(std::move(files), arguments.files));
  const std::string directory = arguments.directory.empty() ? job.id() : arguments.directory;
  std::vector<DownloadedFile> done;
  TransferBar bar(session.terminal());
  for (const v1::OutputFile& file : files) {
    ITWIN_ASSIGN_OR_RETURN(std::string path, gateway.DownloadInto(file, directory, [&](const client::TransferProgress& progress) {
      bar.Show(progress);
    }));
    done.push_back({file, std::move(path)});
  }
  bar.Clear();
  if (files.empty()) *session.terminal().err << "itwin: job " << job.id() << " left no outputs\n";
  session.output().Downloaded(done, directory);
  return kOk;
}

}  // namespace itwin::cli

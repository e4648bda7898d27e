#include <sys/stat.h>

#include <cerrno>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "client/cli/commands/commands.h"
#include "client/cli/job_file.h"
#include "common/files.h"
#include "common/spec/file_references.h"
#include "common/status_macros.h"

namespace itwin::cli {

absl::StatusOr<int> Validate(Session& session, const ValidateArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(JobFile file, ReadJobFile(arguments.file));
  v1::ValidateJobResponse response;
  ITWIN_ASSIGN_OR_RETURN(*response.mutable_spec(), ParseJobFile(file, arguments.file, arguments.overrides));
  for (v1::FileReference& reference : FileReferences(response.spec())) {
    if (PlaceOf(reference.value()) == FilePlace::kLocal) {
      const std::string path = (std::filesystem::path(file.base_directory) / reference.value()).string();
      struct stat info;
      if (stat(path.c_str(), &info) != 0) {
        return absl::InvalidArgumentError(absl::StrCat(reference.field(), ": ", ErrnoStatus(errno, path).message(),
                                                       "; paths are relative to the job's file"));
      }
      if (!S_ISREG(info.st_mode)) {
        return absl::InvalidArgumentError(absl::StrCat(reference.field(), ": ", path, " is not a file; name a file"));
      }
    }
    *response.add_files() = std::move(reference);
  }
  if (arguments.remote) {
    ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
    ITWIN_ASSIGN_OR_RETURN(response, gateway.Validate(file.text, arguments.overrides));
  }
  session.output().Validated(response, arguments.remote);
  return kOk;
}

}  // namespace itwin::cli

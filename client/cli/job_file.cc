#include "client/cli/job_file.h"

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/spec/spec_document.h"
#include "common/spec/validate.h"
#include "common/status_macros.h"

namespace itwin::cli {
namespace {

absl::Status InFile(const std::string& path, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::InvalidArgumentError(absl::StrCat(path, " is not a valid job:\n", status.message()));
}

}  // namespace

absl::StatusOr<JobFile> ReadJobFile(const std::string& path) {
  const bool standard_input = path == "-";
  absl::StatusOr<std::string> text = ReadFile(standard_input ? "/dev/stdin" : path, kMaxDocumentBytes + 1);
  if (text.status().code() == absl::StatusCode::kOutOfRange) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is larger than ", kMaxDocumentBytes,
                                                   " bytes; a job's document is small (data belong in files that it names)"));
  }
  if (!text.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot read the job's file: ", text.status().message(), "; give its path, or '-'"));
  }
  const std::string directory = std::filesystem::path(path).parent_path().string();
  return JobFile{.text = *std::move(text), .base_directory = standard_input || directory.empty() ? "." : directory};
}

absl::StatusOr<v1::JobSpec> ParseJobFile(const JobFile& file, const std::string& path,
                                         const std::vector<std::string>& overrides) {
  absl::StatusOr<v1::JobSpec> spec = ParseSpecDocument(file.text, overrides);
  if (!spec.ok()) return InFile(path, spec.status());
  ITWIN_RETURN_IF_ERROR(InFile(path, ValidateSpec(*spec)));
  return spec;
}

}  // namespace itwin::cli

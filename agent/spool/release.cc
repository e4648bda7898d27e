#include "agent/spool/release.h"

#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/ids.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxFiles = 1000;

bool IsReleaseName(const std::string& name) {
  return !name.empty() && name.size() <= 100 && name[0] != '.' && name != "current" &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '-' || c == '_' || c == '+';
         });
}

}  // namespace

absl::StatusOr<std::string> InstallRelease(const std::string& root, const v1::InstallReleaseRequest& request,
                                           InputStore* inputs) {
  if (!IsReleaseName(request.name())) {
    return absl::InvalidArgumentError(absl::StrCat("'", request.name(), "' is no name of a release"));
  }
  if (request.files_size() > kMaxFiles) return absl::InvalidArgumentError(absl::StrCat("at most ", kMaxFiles, " files make a release"));
  const std::string releases = root + "/releases";
  const std::string final_path = absl::StrCat(releases, "/", request.name());
  const std::string current = releases + "/current";
  ITWIN_RETURN_IF_ERROR(MakeDirectories(releases));
  std::error_code error;
  if (!fs::is_directory(final_path, error)) {
    const std::string making = absl::StrCat(releases, "/.", request.name(), ".", RandomHex(4));
    const absl::Cleanup remove = [&] {
      std::error_code ignored;
      fs::remove_all(making, ignored);
    };
    ITWIN_RETURN_IF_ERROR(MakeDirectories(making));
    for (const v1::StagedInput& file : request.files()) {
      ITWIN_RETURN_IF_ERROR(CheckRelativePath(file.path()));
      const std::string path = absl::StrCat(making, "/", file.path());
      ITWIN_RETURN_IF_ERROR(MakeDirectories(fs::path(path).parent_path().string()));
      ITWIN_RETURN_IF_ERROR(Annotate(inputs->Place(file.sha256(), path, file.executable()), file.path()));
    }
    for (const std::string& name : request.carry()) {
      ITWIN_RETURN_IF_ERROR(CheckRelativePath(name));
      const fs::path from = fs::path(current) / name;
      if (!fs::exists(from, error) || fs::exists(making + "/" + name, error)) continue;
      fs::copy(from, making + "/" + name, fs::copy_options::copy_symlinks, error);
      if (error) return absl::UnavailableError(absl::StrCat(from.string(), ": ", error.message()));
    }
    ITWIN_RETURN_IF_ERROR(FsyncDirectory(making));
    // Another one may have made the same meanwhile; then it is as good as ours.
    if (rename(making.c_str(), final_path.c_str()) != 0 && errno != EEXIST && errno != ENOTEMPTY) {
      return ErrnoStatus(errno, final_path);
    }
  }
  const std::string link = absl::StrCat(releases, "/.current.", RandomHex(4));
  if (symlink(request.name().c_str(), link.c_str()) != 0) return ErrnoStatus(errno, link);
  if (rename(link.c_str(), current.c_str()) != 0) {
    const absl::Status status = ErrnoStatus(errno, current);
    unlink(link.c_str());
    return status;
  }
  ITWIN_RETURN_IF_ERROR(FsyncDirectory(releases));
  return final_path;
}

}  // namespace itwin::agent

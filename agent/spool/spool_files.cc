#include "agent/spool/spool_files.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

constexpr int kMaxDepth = 64;

absl::Status Walk(FileDescriptor directory, const std::string& prefix, int depth, std::vector<SpoolFileEntry>* out) {
  if (depth > kMaxDepth) {
    return absl::ResourceExhaustedError(absl::StrCat("'", prefix, "' lies more than ", kMaxDepth, " directories deep"));
  }
  std::unique_ptr<DIR, int (*)(DIR*)> stream(fdopendir(directory.get()), closedir);
  if (stream == nullptr) return ErrnoStatus(errno, prefix);
  directory.Release();  // closedir closes it
  const int fd = dirfd(stream.get());
  while (const dirent* entry = readdir(stream.get())) {
    const std::string name = entry->d_name;
    if (name == "." || name == "..") continue;
    struct stat info;
    if (fstatat(fd, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0) continue;  // gone meanwhile
    const std::string path = prefix.empty() ? name : absl::StrCat(prefix, "/", name);
    if (S_ISDIR(info.st_mode)) {
      FileDescriptor child(openat(fd, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
      if (child.valid()) ITWIN_RETURN_IF_ERROR(Walk(std::move(child), path, depth + 1, out));
    } else if (S_ISREG(info.st_mode)) {
      if (!CheckRelativePath(path).ok()) continue;  // a name that could not be asked for
      if (static_cast<int>(out->size()) >= kMaxListedFiles) {
        return absl::ResourceExhaustedError(
            absl::StrCat("there are more than ", kMaxListedFiles, " files; pack them into an archive"));
      }
      out->push_back({path, info.st_size});
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<SpoolFileEntry>> ListFilesBeneath(const std::string& directory) {
  std::vector<SpoolFileEntry> out;
  absl::StatusOr<FileDescriptor> fd = OpenFile(directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
  if (absl::IsNotFound(fd.status())) return out;
  if (!fd.ok()) return fd.status();
  ITWIN_RETURN_IF_ERROR(Walk(*std::move(fd), "", 0, &out));
  std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.path < b.path; });
  return out;
}

absl::StatusOr<FileDescriptor> OpenBeneath(const std::string& directory, const std::string& path) {
  ITWIN_RETURN_IF_ERROR(CheckRelativePath(path));
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor at, OpenFile(directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW));
  const std::vector<std::string> parts = absl::StrSplit(path, '/');
  for (size_t i = 0; i < parts.size(); ++i) {
    const bool last = i + 1 == parts.size();
    // O_NONBLOCK: a pipe a job left there must not hold us up.
    const int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC | (last ? O_NONBLOCK : O_DIRECTORY);
    FileDescriptor next(openat(at.get(), parts[i].c_str(), flags));
    if (!next.valid()) {
      if (errno == ELOOP) return absl::NotFoundError(absl::StrCat("'", path, "' is a link or lies behind one"));
      return ErrnoStatus(errno, absl::StrCat("'", path, "'"));
    }
    at = std::move(next);
  }
  struct stat info;
  if (fstat(at.get(), &info) != 0) return ErrnoStatus(errno, path);
  if (!S_ISREG(info.st_mode)) return absl::NotFoundError(absl::StrCat("'", path, "' is not a regular file"));
  return at;
}

absl::Status RemoveTree(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) return absl::UnavailableError(absl::StrCat("cannot remove ", path, ": ", error.message()));
  return absl::OkStatus();
}

}  // namespace itwin::agent

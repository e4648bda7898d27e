#include "agent/spool/attempt_directory.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace itwin::agent {

namespace fs = std::filesystem;

bool FileExists(const std::string& path) {
  struct stat info;
  return lstat(path.c_str(), &info) == 0;
}

AttemptDirectory::AttemptDirectory(std::string root, AttemptKey key)
    : root_(std::move(root)), key_(std::move(key)),
      path_(absl::StrCat(root_, "/", key_.job().text(), "/", key_.number())) {}

absl::StatusOr<AttemptDirectory> AttemptDirectory::FromPath(const std::string& path) {
  std::error_code error;
  const fs::path absolute = fs::absolute(path, error).lexically_normal();
  fs::path clean = absolute.filename().empty() ? absolute.parent_path() : absolute;
  const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(
      absl::StrCat(clean.parent_path().filename().string(), "-", clean.filename().string()));
  if (!key.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", path, "' is not the directory of an attempt; it would end in /<job>/<number>"));
  }
  return AttemptDirectory(clean.parent_path().parent_path().string(), *key);
}

bool AttemptDirectory::HasRequest() const { return FileExists(request_path()); }
bool AttemptDirectory::HasLease() const { return FileExists(lease_path()); }
bool AttemptDirectory::IsCancelled() const { return FileExists(cancelled_path()); }

bool AttemptDirectory::HasCheckpoint() const {
  std::error_code error;
  bool steps = false, others = false;
  for (fs::directory_iterator it(checkpoints_path(), error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (absl::StartsWith(name, "step-")) {
      // step-<n>.partial is not whole yet, even with its manifest.
      if (!absl::EndsWith(name, ".partial") && FileExists((it->path() / "manifest.json").string())) return true;
      steps = true;
    } else if (!absl::StartsWith(name, ".") && !absl::EndsWith(name, ".tmp")) {
      others = true;
    }
  }
  return others && !steps;
}

std::optional<std::string> HostOfNodeFile(const std::string& name) {
  constexpr absl::string_view kPrefix = "node-", kSuffix = ".jsonl";
  if (name.size() <= kPrefix.size() + kSuffix.size() || !absl::StartsWith(name, kPrefix) ||
      !absl::EndsWith(name, kSuffix)) {
    return std::nullopt;
  }
  return name.substr(kPrefix.size(), name.size() - kPrefix.size() - kSuffix.size());
}

absl::StatusOr<std::vector<AttemptKey>> ListAttemptDirectories(const std::string& root) {
  std::vector<AttemptKey> out;
  std::error_code error;
  fs::directory_iterator jobs(root, error);
  if (error) return absl::UnavailableError(absl::StrCat(root, ": ", error.message()));
  for (fs::directory_iterator end; jobs != end; jobs.increment(error)) {
    const absl::StatusOr<JobId> job = JobId::Parse(jobs->path().filename().string());
    if (!job.ok()) continue;
    std::error_code inner;
    for (fs::directory_iterator it(jobs->path(), inner), last; !inner && it != last; it.increment(inner)) {
      const absl::StatusOr<AttemptKey> key =
          AttemptKey::Parse(absl::StrCat(job->text(), "-", it->path().filename().string()));
      if (key.ok()) out.push_back(*key);
    }
    if (error) return absl::UnavailableError(absl::StrCat(root, ": ", error.message()));
  }
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace itwin::agent

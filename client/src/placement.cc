#include "client/src/placement.h"

#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/sha256.h"
#include "common/spec/file_references.h"
#include "common/status_macros.h"

namespace itwin::client {
namespace {

constexpr int64_t kHashChunk = 1 << 20;

// Where a file goes: where it is below the base directory, else its base name. Files of a command go by base name.
std::string TargetOf(const v1::FileReference& reference) {
  const std::filesystem::path path = std::filesystem::path(reference.value()).lexically_normal();
  const bool outside = path.is_absolute() || absl::StartsWith(path.string(), "..");
  if (outside || absl::StartsWith(reference.field(), "command.")) return path.filename().string();
  return path.string();
}

}  // namespace

absl::StatusOr<std::vector<LocalFile>> PlaceLocalFiles(v1::JobSpec* spec, const std::string& base_directory,
                                                       const OnHashed& on_hashed) {
  std::map<std::string, std::pair<std::string, std::string>> taken;  // target -> (hash, who put it there)
  for (const v1::InputFile& input : spec->inputs()) taken[input.path()] = {input.sha256(), "`inputs`"};
  std::map<std::string, std::string> hashes;  // by path: a file named twice is read once
  std::set<std::string> listed;
  std::vector<LocalFile> out;
  for (const v1::FileReference& reference : FileReferences(*spec)) {
    if (PlaceOf(reference.value()) != FilePlace::kLocal || taken.count(reference.value()) > 0) continue;
    const std::string path = (std::filesystem::path(base_directory) / reference.value()).string();
    const auto annotated = [&](const absl::Status& status, absl::string_view hint) {
      return absl::Status(status.code(), absl::StrCat(reference.field(), ": ", status.message(), hint));
    };
    struct stat info;
    if (stat(path.c_str(), &info) != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(reference.field(), ": ", ErrnoStatus(errno, path).message(),
                       "; paths are relative to the job's file (\"site:<path>\" names a file that lies at the site)"));
    }
    if (!S_ISREG(info.st_mode)) {
      return absl::InvalidArgumentError(absl::StrCat(reference.field(), ": ", path, " is not a file; name a file"));
    }
    std::string& hash = hashes[path];
    if (hash.empty()) {
      Sha256 sha;
      int64_t done = 0;
      const absl::Status read = ReadFileChunks(path, kHashChunk, [&](absl::string_view chunk) {
        sha.Update(chunk);
        done += static_cast<int64_t>(chunk.size());
        if (on_hashed) on_hashed(path, done, info.st_size);
        return absl::OkStatus();
      });
      if (!read.ok()) return annotated(read, "");
      hash = sha.FinishHex();
    }
    const std::string target = TargetOf(reference);
    if (absl::Status good = CheckRelativePath(target); !good.ok()) return annotated(good, "; rename the file");
    const auto [place, fresh] = taken.emplace(target, std::make_pair(hash, reference.field()));
    if (!fresh && place->second.first != hash) {
      return absl::InvalidArgumentError(absl::StrCat(reference.field(), ": ", path, " would lie at '", target,
                                                     "' in the working directory, where another file of ",
                                                     place->second.second, " lies; rename one"));
    }
    if (fresh) {
      v1::InputFile* input = spec->add_inputs();
      input->set_path(target);
      input->set_sha256(hash);
      input->set_executable((info.st_mode & S_IXUSR) != 0);
    }
    ITWIN_RETURN_IF_ERROR(SetFileReference(spec, reference.field(), target));
    if (listed.insert(hash).second) out.push_back({path, target, hash, info.st_size});
  }
  return out;
}

}  // namespace itwin::client

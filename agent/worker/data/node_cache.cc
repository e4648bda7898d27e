#include "agent/worker/data/node_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string>
#include <vector>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;

// Held by the process that copies; the system lets go of it when that dies.
class Lock {
 public:
  explicit Lock(const fs::path& path) {
    fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd_ < 0) ThrowIoError("cannot open", path, errno);
    while (flock(fd_, LOCK_EX) != 0) {
      if (errno != EINTR) ThrowIoError("cannot lock", path, errno);
    }
  }
  ~Lock() { close(fd_); }
  Lock(const Lock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace

fs::path CopyToNode(const fs::path& source, const fs::path& directory) {
  struct stat status {};
  if (stat(source.c_str(), &status) != 0) ThrowIoError("cannot read", source, errno);
  MakeDirectories(directory);
  const std::string key =
      Sha256Hex(fs::absolute(source).string() + "\n" + std::to_string(status.st_size) + "\n" +
                std::to_string(status.st_mtim.tv_sec) + "." + std::to_string(status.st_mtim.tv_nsec))
          .substr(0, 24);
  const fs::path copy = directory / (key + "-" + source.filename().string());
  const Lock lock(directory / (key + ".lock"));
  std::error_code error;
  if (fs::file_size(copy, error) == static_cast<uintmax_t>(status.st_size) && !error) return copy;

  const fs::path partial = copy.string() + ".partial";
  const int in = open(source.c_str(), O_RDONLY | O_CLOEXEC);
  if (in < 0) ThrowIoError("cannot read", source, errno);
  Sha256 hash;
  try {
    OutputFile out(partial);
    std::vector<char> block(4 << 20);
    while (true) {
      const ssize_t got = read(in, block.data(), block.size());
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) ThrowIoError("cannot read", source, errno);
      if (got == 0) break;
      hash.Update(block.data(), static_cast<size_t>(got));
      out.Write(block.data(), static_cast<size_t>(got));
    }
    out.SyncAndClose();
  } catch (...) {
    close(in);
    fs::remove(partial, error);
    throw;
  }
  close(in);
  if (DigestFile(partial).sha256 != hash.Hex()) {
    fs::remove(partial, error);
    throw AppError("the copy of " + source.string() + " in " + directory.string() +
                   " does not hold what was written; is that disk sound?");
  }
  fs::rename(partial, copy, error);
  if (error) ThrowIoError("cannot create", copy, error.value());
  return copy;
}

fs::path NodeCacheDirectory() {
  for (const char* name : {"SLURM_TMPDIR", "TMPDIR"}) {
    const char* value = std::getenv(name);
    if (value != nullptr && *value != '\0') {
      return fs::path(value) / ("itwin-inputs-" + std::to_string(getuid()));
    }
  }
  return {};
}

}  // namespace itwin::worker

#include "client/src/transfer.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/sha256.h"
#include "common/status_macros.h"

namespace itwin::client {
namespace {

constexpr int64_t kChunkBytes = 512 << 10;  // the contract allows 1 MiB
constexpr int kStatPageSize = 1'000;
// A transfer that moves nothing for this long is over; one that moves goes on for as long as it takes.
constexpr absl::Duration kStalledLimit = absl::Seconds(60);

RetryPolicy TransferPolicy() {
  RetryPolicy policy;
  policy.give_up_after = kStalledLimit;
  policy.max_exhausted = 1;  // the disk is full
  return policy;
}

// Repeats `step` as RetryLoop does, but from the start of its patience whenever `done` has grown.
absl::Status WhileThereIsProgress(const Pacing& pacing, const int64_t* done,
                                  const std::function<absl::Status()>& step) {
  int64_t before = -1;
  while (true) {
    before = *done;
    const absl::Status status = RetryLoop(TransferPolicy(), Idempotency::kIdempotent, pacing, nullptr, step);
    if (status.ok() || *done == before || !IsTransient(status.code(), Idempotency::kIdempotent) ||
        status.code() == absl::StatusCode::kResourceExhausted) {
      return status;
    }
  }
}

absl::Status UploadOne(Connection& connection, const LocalFile& file, int64_t received, const OnProgress& progress,
                       const Pacing& pacing) {
  int64_t furthest = received;
  bool first_try = true;
  const absl::Status status = WhileThereIsProgress(pacing, &furthest, [&]() -> absl::Status {
    int64_t offset = received;
    if (!first_try) {
      v1::StatArtifactsRequest request;
      request.add_sha256(file.sha256);
      ITWIN_ASSIGN_OR_RETURN(v1::StatArtifactsResponse stat, connection.StatArtifacts(request));
      if (stat.artifacts_size() != 1) return absl::InternalError("the gateway's answer has no artifact");
      if (stat.artifacts(0).complete()) return absl::OkStatus();
      offset = stat.artifacts(0).received_bytes();
    }
    first_try = false;
    if (offset < 0 || offset > file.size_bytes) offset = 0;
    bool first = true;
    const auto next = [&]() -> absl::StatusOr<std::optional<v1::UploadArtifactRequest>> {
      v1::UploadArtifactRequest request;
      if (first) {
        request.set_sha256(file.sha256);
        request.set_size_bytes(file.size_bytes);
        request.set_offset(offset);
      } else if (offset >= file.size_bytes) {
        return std::nullopt;
      }
      first = false;
      ITWIN_ASSIGN_OR_RETURN(*request.mutable_data(), ReadFileRange(file.path, offset, std::min(kChunkBytes, file.size_bytes - offset)));
      if (request.data().empty() && offset < file.size_bytes) {
        return absl::DataLossError(absl::StrCat(file.path, ": became shorter while it was uploaded; submit again"));
      }
      offset += static_cast<int64_t>(request.data().size());
      furthest = std::max(furthest, offset);
      if (progress) progress({TransferProgress::Phase::kUploading, file.path, offset, file.size_bytes});
      return request;
    };
    return connection.UploadArtifact(next).status();
  });
  if (status.code() == absl::StatusCode::kDataLoss) {
    return absl::DataLossError(absl::StrCat(file.path, ": ", status.message(),
                                            " (a file that is written to while it is uploaded does this; submit again)"));
  }
  if (!status.ok()) return absl::Status(status.code(), absl::StrCat("upload ", file.path, ": ", status.message()));
  return status;
}

// The bytes of a broken-off download, with their hash so far.
class PartFile {
 public:
  static absl::StatusOr<PartFile> Open(const std::string& path) {
    PartFile part;
    part.path_ = path;
    ITWIN_ASSIGN_OR_RETURN(part.file_, OpenFile(path, O_RDWR | O_CREAT, 0666));
    if (flock(part.file_.get(), LOCK_EX | LOCK_NB) != 0) {
      return absl::FailedPreconditionError(absl::StrCat(path, ": another download is writing to it; wait for it"));
    }
    ITWIN_RETURN_IF_ERROR(ReadFileChunks(path, kChunkBytes, [&](absl::string_view chunk) {
      part.hash_.Update(chunk);
      part.size_ += static_cast<int64_t>(chunk.size());
      return absl::OkStatus();
    }));
    if (lseek(part.file_.get(), 0, SEEK_END) < 0) return ErrnoStatus(errno, path);
    return part;
  }

  int64_t size() const { return size_; }
  absl::Status Append(absl::string_view bytes) {
    ITWIN_RETURN_IF_ERROR(WriteAll(file_.get(), bytes, path_));
    hash_.Update(bytes);
    size_ += static_cast<int64_t>(bytes.size());
    return absl::OkStatus();
  }
  absl::Status Clear() {
    if (ftruncate(file_.get(), 0) != 0 || lseek(file_.get(), 0, SEEK_SET) < 0) return ErrnoStatus(errno, path_);
    hash_ = Sha256();
    size_ = 0;
    return absl::OkStatus();
  }
  std::string Hash() { return hash_.FinishHex(); }
  absl::Status MoveTo(const std::string& target) {
    if (fsync(file_.get()) != 0) return ErrnoStatus(errno, path_);
    if (rename(path_.c_str(), target.c_str()) != 0) return ErrnoStatus(errno, target);
    const std::string directory = std::filesystem::path(target).parent_path().string();
    return FsyncDirectory(directory.empty() ? "." : directory);
  }
  void Remove() { unlink(path_.c_str()); }

 private:
  PartFile() = default;
  std::string path_;
  FileDescriptor file_;
  Sha256 hash_;
  int64_t size_ = 0;
};

bool IsThereAlready(const v1::OutputFile& file, const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_size != file.size_bytes()) return false;
  absl::StatusOr<std::string> hash = Sha256OfFile(path);
  return hash.ok() && *hash == file.sha256();
}

}  // namespace

absl::Status UploadFiles(Connection& connection, const std::vector<LocalFile>& files, const OnProgress& progress,
                         const Pacing& pacing) {
  for (size_t begin = 0; begin < files.size(); begin += kStatPageSize) {
    const size_t end = std::min(files.size(), begin + kStatPageSize);
    v1::StatArtifactsRequest request;
    for (size_t i = begin; i < end; ++i) request.add_sha256(files[i].sha256);
    ITWIN_ASSIGN_OR_RETURN(v1::StatArtifactsResponse stat, connection.StatArtifacts(request));
    if (stat.artifacts_size() != request.sha256_size()) {
      return absl::InternalError("the gateway's answer does not list the artifacts asked for");
    }
    for (size_t i = begin; i < end; ++i) {
      const v1::ArtifactStatus& artifact = stat.artifacts(static_cast<int>(i - begin));
      if (artifact.complete()) continue;
      ITWIN_RETURN_IF_ERROR(UploadOne(connection, files[i], artifact.received_bytes(), progress, pacing));
    }
  }
  return absl::OkStatus();
}

absl::Status DownloadFile(Connection& connection, const v1::OutputFile& file, const std::string& path,
                          const OnProgress& progress, const Pacing& pacing) {
  if (!IsSha256Hex(file.sha256())) return absl::DataLossError(absl::StrCat(file.path(), ": has no valid checksum"));
  const std::string directory = std::filesystem::path(path).parent_path().string();
  if (!directory.empty()) ITWIN_RETURN_IF_ERROR(MakeDirectories(directory, 0777));
  const auto tell = [&](int64_t done) {
    if (progress) progress({TransferProgress::Phase::kDownloading, path, done, file.size_bytes()});
  };
  if (IsThereAlready(file, path)) {
    tell(file.size_bytes());
    return absl::OkStatus();
  }
  ITWIN_ASSIGN_OR_RETURN(PartFile part, PartFile::Open(absl::StrCat(path, ".part")));
  bool resumed = part.size() > 0;
  if (part.size() > file.size_bytes()) {
    ITWIN_RETURN_IF_ERROR(part.Clear());
    resumed = false;
  }
  while (true) {
    int64_t done = part.size();
    const absl::Status status = WhileThereIsProgress(pacing, &done, [&]() -> absl::Status {
      tell(part.size());
      if (part.size() == file.size_bytes()) return absl::OkStatus();
      v1::DownloadArtifactRequest request;
      request.set_sha256(file.sha256());
      request.set_offset(part.size());
      const auto keep = [&](const v1::DownloadArtifactResponse& response) -> absl::Status {
        if (part.size() + static_cast<int64_t>(response.data().size()) > file.size_bytes()) {
          return absl::DataLossError(absl::StrCat(path, ": the gateway sent more than ", file.size_bytes(), " bytes"));
        }
        ITWIN_RETURN_IF_ERROR(part.Append(response.data()));
        done = part.size();
        tell(done);
        return absl::OkStatus();
      };
      ITWIN_RETURN_IF_ERROR(connection.DownloadArtifact(request, keep));
      if (part.size() == file.size_bytes()) return absl::OkStatus();
      return absl::UnavailableError(absl::StrCat("the stream ended after ", part.size(), " of ", file.size_bytes(), " bytes"));
    });
    if (!status.ok()) return absl::Status(status.code(), absl::StrCat("download ", path, ": ", status.message()));
    if (part.Hash() == file.sha256()) return part.MoveTo(path);
    // The part may be of another file of that name: once more, from the start.
    if (!resumed) {
      part.Remove();
      return absl::DataLossError(absl::StrCat(path, ": the bytes received do not have the checksum of ", file.path(),
                                              "; nothing was kept. Try again, and tell the gateway's operator if it stays"));
    }
    resumed = false;
    ITWIN_RETURN_IF_ERROR(part.Clear());
  }
}

}  // namespace itwin::client

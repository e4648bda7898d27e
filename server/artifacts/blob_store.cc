#include "server/artifacts/blob_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

constexpr int64_t kHashChunkBytes = 1 << 20;
constexpr int64_t kCheckRoomEvery = 16 << 20;  // bytes between two looks at the free space

absl::Status CheckHash(absl::string_view sha256) {
  if (IsSha256Hex(sha256)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("'", absl::CHexEscape(sha256.substr(0, 80)),
                                                 "' is not an artifact's name: use its SHA-256, 64 lower-case hex digits"));
}

// -1 when there is no such file.
int64_t SizeOf(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) ? info.st_size : -1;
}

}  // namespace

BlobStore::BlobStore(const Options& options) : options_(options) {}

absl::StatusOr<std::unique_ptr<BlobStore>> BlobStore::Open(const Options& options) {
  for (const char* folder : {"/blobs", "/partial"}) {
    ITWIN_RETURN_IF_ERROR(MakeDirectories(options.directory + folder, 0700));
  }
  return std::unique_ptr<BlobStore>(new BlobStore(options));
}

std::string BlobStore::BlobPath(absl::string_view sha256) const {
  return absl::StrCat(options_.directory, "/blobs/", sha256.substr(0, 2), "/", sha256);
}
std::string BlobStore::PartialPath(absl::string_view sha256) const {
  return absl::StrCat(options_.directory, "/partial/", sha256);
}

absl::Status BlobStore::CheckRoom(int64_t bytes) const {
  struct statvfs info;
  if (statvfs(options_.directory.c_str(), &info) != 0) return absl::OkStatus();  // the write itself will tell
  const auto free = static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
  if (free - bytes >= options_.min_free_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("the gateway's disk has ", free >> 20, " MiB left and keeps ", options_.min_free_bytes >> 20,
                   " MiB free: no room for ", bytes, " more bytes of artifacts. What arrived is kept; try again later"));
}

absl::Status BlobStore::Claim(const std::string& sha256) {
  absl::MutexLock lock(&mu_);
  if (writers_.insert(sha256).second) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat("artifact ", sha256, " is being uploaded by another call; try again, it may be complete then"));
}

void BlobStore::Unclaim(const std::string& sha256) {
  absl::MutexLock lock(&mu_);
  writers_.erase(sha256);
}

absl::StatusOr<BlobStore::Stat> BlobStore::StatBlob(absl::string_view sha256) const {
  ITWIN_RETURN_IF_ERROR(CheckHash(sha256));
  if (const int64_t size = SizeOf(BlobPath(sha256)); size >= 0) return Stat{true, size, size};
  return Stat{false, 0, std::max<int64_t>(0, SizeOf(PartialPath(sha256)))};
}

absl::StatusOr<std::unique_ptr<BlobStore::Writer>> BlobStore::OpenWriter(absl::string_view sha256, int64_t size,
                                                                         int64_t offset) {
  ITWIN_RETURN_IF_ERROR(CheckHash(sha256));
  if (size < 0 || size > options_.max_blob_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("an artifact of ", size, " bytes: use 0 to ",
                                                   options_.max_blob_bytes, " bytes"));
  }
  if (offset < 0 || offset > size) {
    return absl::InvalidArgumentError(absl::StrCat("offset ", offset, " is outside an artifact of ", size, " bytes"));
  }
  ITWIN_RETURN_IF_ERROR(Claim(std::string(sha256)));
  // From here on the writer's end gives the claim back.
  std::unique_ptr<Writer> writer(new Writer(this, std::string(sha256), size));
  if (const int64_t stored = SizeOf(BlobPath(sha256)); stored >= 0) {
    if (stored != size) {
      return absl::InvalidArgumentError(
          absl::StrCat("artifact ", sha256, " has ", stored, " bytes, not ", size, ": size or hash is wrong"));
    }
    writer->complete_ = true;
    writer->offset_ = size;
    return writer;
  }
  const std::string path = PartialPath(sha256);
  const int64_t there = std::max<int64_t>(0, SizeOf(path));
  if (offset > there) {
    return absl::FailedPreconditionError(absl::StrCat("artifact ", sha256, ": ", there, " bytes have arrived; go on from there, not from ",
                                                      offset));
  }
  ITWIN_RETURN_IF_ERROR(CheckRoom(size - offset));
  ITWIN_ASSIGN_OR_RETURN(writer->file_, OpenFile(path, O_RDWR | O_CREAT, 0600));
  if (ftruncate(writer->file_.get(), offset) != 0) return ErrnoStatus(errno, path);
  // The bytes of earlier calls go into the hash first.
  while (writer->offset_ < offset) {
    ITWIN_ASSIGN_OR_RETURN(const std::string chunk,
                           ReadFileRange(path, writer->offset_, std::min(kHashChunkBytes, offset - writer->offset_)));
    if (chunk.empty()) return absl::DataLossError(absl::StrCat(path, ": ends before byte ", offset));
    writer->hash_.Update(chunk);
    writer->offset_ += static_cast<int64_t>(chunk.size());
  }
  if (lseek(writer->file_.get(), offset, SEEK_SET) < 0) return ErrnoStatus(errno, path);
  return writer;
}

absl::StatusOr<std::unique_ptr<BlobStore::Writer>> BlobStore::ResumeWriter(absl::string_view sha256, int64_t size) {
  ITWIN_ASSIGN_OR_RETURN(const Stat stat, StatBlob(sha256));
  // More than announced cannot be the same file: begin again.
  const bool usable = stat.received_bytes <= size;
  return OpenWriter(sha256, size, stat.complete || !usable ? 0 : stat.received_bytes);
}

BlobStore::Writer::Writer(BlobStore* store, std::string sha256, int64_t size)
    : store_(store), sha256_(std::move(sha256)), size_(size) {}

BlobStore::Writer::~Writer() { store_->Unclaim(sha256_); }

absl::Status BlobStore::Writer::Append(absl::string_view bytes) {
  if (complete_) return absl::OkStatus();
  if (static_cast<int64_t>(bytes.size()) > size_ - offset_) {
    return absl::InvalidArgumentError(
        absl::StrCat("artifact ", sha256_, ": more bytes than the ", size_, " that were announced"));
  }
  if (offset_ - checked_ >= kCheckRoomEvery) {
    ITWIN_RETURN_IF_ERROR(store_->CheckRoom(static_cast<int64_t>(bytes.size())));
    checked_ = offset_;
  }
  const std::string path = store_->PartialPath(sha256_);
  if (absl::Status written = WriteAll(file_.get(), bytes, path); !written.ok()) {
    // Part of it may be there: back to what the hash has seen, so that a resume goes on from a known place.
    if (ftruncate(file_.get(), offset_) != 0 || lseek(file_.get(), offset_, SEEK_SET) < 0) {
      return Annotate(ErrnoStatus(errno, path), written.message());
    }
    return written;
  }
  hash_.Update(bytes);
  offset_ += static_cast<int64_t>(bytes.size());
  return absl::OkStatus();
}

absl::Status BlobStore::Writer::Commit() {
  if (complete_) return absl::OkStatus();
  if (offset_ != size_) {
    return absl::FailedPreconditionError(
        absl::StrCat("artifact ", sha256_, ": ", offset_, " of ", size_, " bytes have arrived; send the rest"));
  }
  const std::string partial = store_->PartialPath(sha256_);
  if (hash_.FinishHex() != sha256_) {
    unlink(partial.c_str());
    return absl::DataLossError(
        absl::StrCat("the ", size_, " bytes received do not have the SHA-256 ", sha256_, "; nothing was kept, send them again"));
  }
  if (fchmod(file_.get(), 0400) != 0 || fsync(file_.get()) != 0) return ErrnoStatus(errno, partial);
  const std::string path = store_->BlobPath(sha256_);
  const std::string directory = std::filesystem::path(path).parent_path().string();
  ITWIN_RETURN_IF_ERROR(MakeDirectories(directory, 0700));
  if (rename(partial.c_str(), path.c_str()) != 0) return ErrnoStatus(errno, path);
  complete_ = true;
  ITWIN_RETURN_IF_ERROR(FsyncDirectory(directory));
  return FsyncDirectory(absl::StrCat(store_->options_.directory, "/blobs"));
}

absl::StatusOr<BlobStore::Reader> BlobStore::OpenReader(absl::string_view sha256) const {
  ITWIN_ASSIGN_OR_RETURN(const Stat stat, StatBlob(sha256));
  if (!stat.complete) {
    return absl::NotFoundError(absl::StrCat("artifact ", sha256, " is not here",
                                            stat.received_bytes > 0 ? ": its upload is not complete" : ""));
  }
  Reader reader;
  reader.path_ = BlobPath(sha256);
  reader.size_ = stat.size_bytes;
  ITWIN_ASSIGN_OR_RETURN(reader.file_, OpenFile(reader.path_, O_RDONLY));
  return reader;
}

absl::StatusOr<std::string> BlobStore::Reader::Read(int64_t offset, int64_t max_bytes) const {
  std::string out;
  if (offset < 0 || offset >= size_ || max_bytes <= 0) return out;
  out.resize(static_cast<size_t>(std::min(max_bytes, size_ - offset)));
  size_t used = 0;
  while (used < out.size()) {
    const ssize_t got = pread(file_.get(), out.data() + used, out.size() - used,
                              static_cast<off_t>(offset) + static_cast<off_t>(used));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, path_);
    if (got == 0) return absl::DataLossError(absl::StrCat(path_, ": shorter than its ", size_, " bytes"));
    used += static_cast<size_t>(got);
  }
  return out;
}

absl::StatusOr<std::string> BlobStore::PathOf(absl::string_view sha256) const {
  ITWIN_ASSIGN_OR_RETURN(const Stat stat, StatBlob(sha256));
  if (!stat.complete) return absl::NotFoundError(absl::StrCat("artifact ", sha256, " is not here"));
  return BlobPath(sha256);
}

int BlobStore::RemoveStalePartials(absl::Time before) {
  int removed = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(options_.directory + "/partial", error)) {
    const std::string name = entry.path().filename().string();
    struct stat info;
    if (stat(entry.path().c_str(), &info) != 0 || absl::TimeFromTimespec(info.st_mtim) >= before) continue;
    if (!Claim(name).ok()) continue;  // in use after all
    if (unlink(entry.path().c_str()) == 0) ++removed;
    Unclaim(name);
  }
  return removed;
}

absl::StatusOr<std::string> BlobStore::PutText(absl::string_view bytes) {
  std::string sha256 = Sha256Hex(bytes);
  ITWIN_ASSIGN_OR_RETURN(const std::unique_ptr<Writer> writer,
                         OpenWriter(sha256, static_cast<int64_t>(bytes.size()), 0));
  ITWIN_RETURN_IF_ERROR(writer->Append(bytes));
  ITWIN_RETURN_IF_ERROR(writer->Commit());
  return sha256;
}

}  // namespace itwin::server

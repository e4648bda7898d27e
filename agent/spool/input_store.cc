#include "agent/spool/input_store.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "agent/spool/fault_point.h"
#include "common/ids.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

// Verified content carries this modification time (2000-01-01): any later write to it shows.
constexpr timespec kVerifiedTime = {946684800, 0};
constexpr int64_t kMaxInputBytes = int64_t{1} << 44;
constexpr absl::Duration kUseResolution = absl::Hours(1);  // how exactly the last use of an entry is known

absl::Status CheckName(const std::string& sha256) {
  if (IsSha256Hex(sha256)) return absl::OkStatus();
  return absl::InvalidArgumentError("an input is named by its SHA-256: 64 lower-case hex digits");
}

absl::Status MarkVerified(const std::string& path) {
  const timespec times[2] = {{0, UTIME_NOW}, kVerifiedTime};
  if (chmod(path.c_str(), 0400) != 0 || utimensat(AT_FDCWD, path.c_str(), times, 0) != 0) {
    return ErrnoStatus(errno, path);
  }
  return absl::OkStatus();
}

// The access time says when an entry was last asked for; set by hand, for many file systems do not.
void NoteUse(const std::string& path, const struct stat& info) {
  if (absl::Now() - absl::TimeFromTimespec(info.st_atim) < kUseResolution) return;
  const timespec times[2] = {{0, UTIME_NOW}, {0, UTIME_OMIT}};
  utimensat(AT_FDCWD, path.c_str(), times, 0);
}

absl::Status Copy(const std::string& from, const std::string& to, unsigned mode) {
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor in, OpenFile(from, O_RDONLY));
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor out, OpenFile(to, O_WRONLY | O_CREAT | O_EXCL, mode));
  if (ioctl(out.get(), FICLONE, in.get()) == 0) return absl::OkStatus();  // shared blocks, own inode
  return ReadFileChunks(from, 1 << 20, [&](absl::string_view chunk) { return WriteAll(out.get(), chunk, to); });
}

}  // namespace

absl::Status InputStore::Create() { return MakeDirectories(directory_); }

absl::StatusOr<InputState> InputStore::Stat(const std::string& sha256) {
  ITWIN_RETURN_IF_ERROR(CheckName(sha256));
  struct stat info;
  if (lstat(PathOf(sha256).c_str(), &info) == 0) {
    if (S_ISREG(info.st_mode) && info.st_mtim.tv_sec == kVerifiedTime.tv_sec && info.st_mtim.tv_nsec == 0) {
      NoteUse(PathOf(sha256), info);
      return InputState{.complete = true, .received_bytes = info.st_size};
    }
    const absl::StatusOr<std::string> actual = Sha256OfFile(PathOf(sha256));
    if (actual.ok() && *actual == sha256) {
      ITWIN_RETURN_IF_ERROR(MarkVerified(PathOf(sha256)));
      return InputState{.complete = true, .received_bytes = info.st_size};
    }
    if (!actual.ok() && !absl::IsNotFound(actual.status())) return actual.status();
    unlink(PathOf(sha256).c_str());
  }
  if (lstat((PathOf(sha256) + ".part").c_str(), &info) == 0 && S_ISREG(info.st_mode)) {
    return InputState{.complete = false, .received_bytes = info.st_size};
  }
  return InputState{};
}

absl::StatusOr<InputStore::Upload> InputStore::BeginUpload(const std::string& sha256, int64_t size,
                                                           int64_t offset) {
  ITWIN_ASSIGN_OR_RETURN(const InputState state, Stat(sha256));
  if (size < 0 || size > kMaxInputBytes || offset < 0 || offset > size) {
    return absl::InvalidArgumentError(
        absl::StrCat("size ", size, " and offset ", offset, " of input ", sha256, " do not fit together"));
  }
  Upload upload;
  upload.sha256_ = sha256;
  upload.directory_ = directory_;
  upload.final_path_ = PathOf(sha256);
  upload.part_path_ = upload.final_path_ + ".part";
  upload.size_ = size;
  if (state.complete) {
    upload.complete_ = true;
    return upload;
  }
  ITWIN_ASSIGN_OR_RETURN(upload.file_, OpenFile(upload.part_path_, O_RDWR | O_CREAT | O_NOFOLLOW));
  if (flock(upload.file_.get(), LOCK_EX | LOCK_NB) != 0) {
    return absl::AbortedError(absl::StrCat("input ", sha256, " is being uploaded by another call; wait for it"));
  }
  struct stat info;
  if (fstat(upload.file_.get(), &info) != 0) return ErrnoStatus(errno, upload.part_path_);
  if (offset > info.st_size) {
    return absl::FailedPreconditionError(
        absl::StrCat("input ", sha256, " has ", info.st_size, " bytes here, so it cannot go on at ", offset));
  }
  struct statvfs disk;
  if (fstatvfs(upload.file_.get(), &disk) == 0 &&
      static_cast<uint64_t>(size - offset) > static_cast<uint64_t>(disk.f_bavail) * disk.f_frsize) {
    return absl::ResourceExhaustedError(absl::StrCat("input ", sha256, " needs ", size - offset, " bytes more, but ",
                                                     directory_, " has only ", disk.f_bavail * disk.f_frsize,
                                                     " free; make room at the site"));
  }
  if (ftruncate(upload.file_.get(), offset) != 0 || lseek(upload.file_.get(), 0, SEEK_SET) != 0) {
    return ErrnoStatus(errno, upload.part_path_);
  }
  // What came earlier is hashed from the disk: it is the disk's content that must have the name.
  std::string buffer(1 << 20, '\0');
  while (upload.received_ < offset) {
    const ssize_t got = read(upload.file_.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return ErrnoStatus(got < 0 ? errno : EIO, upload.part_path_);
    upload.hash_.Update(absl::string_view(buffer.data(), static_cast<size_t>(got)));
    upload.received_ += got;
  }
  return upload;
}

absl::Status InputStore::Upload::Write(absl::string_view bytes) {
  if (static_cast<int64_t>(bytes.size()) > size_ - received_ && !complete_) {
    return absl::InvalidArgumentError(
        absl::StrCat("input ", sha256_, " was announced with ", size_, " bytes, but more were sent"));
  }
  if (complete_) return absl::OkStatus();
  ITWIN_RETURN_IF_ERROR(WriteAll(file_.get(), bytes, part_path_));
  hash_.Update(bytes);
  received_ += static_cast<int64_t>(bytes.size());
  FaultPoint("input.written");
  return absl::OkStatus();
}

absl::Status InputStore::Upload::Finish() {
  if (complete_) return absl::OkStatus();
  if (received_ != size_) {
    return absl::InvalidArgumentError(
        absl::StrCat("input ", sha256_, " ended after ", received_, " of ", size_, " bytes; send the rest"));
  }
  if (const std::string actual = hash_.FinishHex(); actual != sha256_) {
    unlink(part_path_.c_str());
    return absl::DataLossError(absl::StrCat("what was sent as input ", sha256_, " has SHA-256 ", actual,
                                            "; it was thrown away, send it again from the start"));
  }
  if (fsync(file_.get()) != 0) return ErrnoStatus(errno, part_path_);
  ITWIN_RETURN_IF_ERROR(MarkVerified(part_path_));
  FaultPoint("input.verified");
  if (rename(part_path_.c_str(), final_path_.c_str()) != 0) return ErrnoStatus(errno, final_path_);
  return FsyncDirectory(directory_);
}

absl::Status InputStore::Place(const std::string& sha256, const std::string& path, bool executable) {
  ITWIN_ASSIGN_OR_RETURN(const InputState state, Stat(sha256));
  if (!state.complete) {
    return absl::FailedPreconditionError(
        absl::StrCat("input ", sha256, " is not complete at this site; upload it before the start"));
  }
  const std::string temporary = absl::StrCat(path, ".", RandomHex(6), ".tmp");
  absl::Cleanup remove = [&] { unlink(temporary.c_str()); };
  // Nobody but root can open the link for writing; root gets an inode of its own.
  const bool link_protects = geteuid() != 0 && !executable;
  if (!link_protects || link(PathOf(sha256).c_str(), temporary.c_str()) != 0) {
    ITWIN_RETURN_IF_ERROR(Copy(PathOf(sha256), temporary, executable ? 0500 : 0400));
  }
  if (rename(temporary.c_str(), path.c_str()) != 0) return ErrnoStatus(errno, path);
  return absl::OkStatus();
}

int64_t InputStore::RemoveUnused(absl::Time since) {
  int64_t bytes = 0;
  std::error_code error;
  for (std::filesystem::directory_iterator it(directory_, error), end; !error && it != end; it.increment(error)) {
    const std::string path = it->path().string();
    struct stat info;
    if (lstat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_nlink > 1) continue;
    const absl::Time used = std::max(absl::TimeFromTimespec(info.st_atim), absl::TimeFromTimespec(info.st_ctim));
    if (used >= since) continue;
    const absl::StatusOr<FileDescriptor> file = OpenFile(path, O_RDONLY | O_NOFOLLOW);
    if (!file.ok() || flock(file->get(), LOCK_EX | LOCK_NB) != 0) continue;  // an upload under way
    if (unlink(path.c_str()) == 0) bytes += info.st_size;
  }
  return bytes;
}

}  // namespace itwin::agent

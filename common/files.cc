#include "common/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/ids.h"
#include "common/status_macros.h"

namespace itwin {
namespace {

constexpr size_t kMaxPathBytes = 1024;

absl::StatusCode CodeOf(int error) {
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::StatusCode::kNotFound;
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::StatusCode::kPermissionDenied;
    case EEXIST:
      return absl::StatusCode::kAlreadyExists;
    case ENOSPC:
    case EDQUOT:
    case EMFILE:
    case ENFILE:
    case EFBIG:
      return absl::StatusCode::kResourceExhausted;
    default:
      return absl::StatusCode::kUnavailable;
  }
}

}  // namespace

absl::Status ErrnoStatus(int error, absl::string_view what) {
  return absl::Status(CodeOf(error), absl::StrCat(what, ": ", std::generic_category().message(error)));
}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    Reset();
    fd_ = other.Release();
  }
  return *this;
}

int FileDescriptor::Release() {
  const int fd = fd_;
  fd_ = -1;
  return fd;
}

void FileDescriptor::Reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

absl::StatusOr<FileDescriptor> OpenFile(const std::string& path, int flags, unsigned mode) {
  int fd;
  do {
    fd = open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) return ErrnoStatus(errno, path);
  return FileDescriptor(fd);
}

absl::Status WriteAll(int fd, absl::string_view bytes, absl::string_view path) {
  while (!bytes.empty()) {
    const ssize_t written = write(fd, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return ErrnoStatus(errno, path);
    }
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFileRange(const std::string& path, int64_t offset, int64_t max_bytes) {
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor file, OpenFile(path, O_RDONLY));
  struct stat info;
  if (fstat(file.get(), &info) != 0) return ErrnoStatus(errno, path);
  if (S_ISDIR(info.st_mode)) return absl::NotFoundError(absl::StrCat(path, ": is a directory"));
  std::string out;
  const int64_t left = S_ISREG(info.st_mode) ? info.st_size - offset : max_bytes;
  if (left <= 0 || max_bytes <= 0) return out;
  out.resize(static_cast<size_t>(std::min(left, max_bytes)));
  size_t used = 0;
  while (used < out.size()) {
    const ssize_t got = pread(file.get(), out.data() + used, out.size() - used,
                              static_cast<off_t>(offset) + static_cast<off_t>(used));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, path);
    if (got == 0) break;
    used += static_cast<size_t>(got);
  }
  out.resize(used);
  return out;
}

absl::Status ReadFileChunks(const std::string& path, int64_t chunk_bytes,
                            const std::function<absl::Status(absl::string_view)>& sink) {
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor file, OpenFile(path, O_RDONLY));
  std::string chunk(static_cast<size_t>(chunk_bytes), '\0');
  while (true) {
    const ssize_t got = read(file.get(), chunk.data(), chunk.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, path);
    if (got == 0) return absl::OkStatus();
    ITWIN_RETURN_IF_ERROR(sink(absl::string_view(chunk.data(), static_cast<size_t>(got))));
  }
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes) {
  std::string out;
  ITWIN_RETURN_IF_ERROR(ReadFileChunks(path, 1 << 16, [&](absl::string_view chunk) -> absl::Status {
    if (static_cast<int64_t>(out.size() + chunk.size()) > max_bytes) {
      return absl::OutOfRangeError(absl::StrCat(path, ": larger than ", max_bytes, " bytes"));
    }
    absl::StrAppend(&out, chunk);
    return absl::OkStatus();
  }));
  return out;
}

absl::Status FsyncDirectory(const std::string& directory) {
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor fd, OpenFile(directory, O_RDONLY | O_DIRECTORY));
  if (fsync(fd.get()) != 0) return ErrnoStatus(errno, directory);
  return absl::OkStatus();
}

absl::Status WriteFileAtomically(const std::string& path, absl::string_view bytes, unsigned mode) {
  const std::string temporary = absl::StrCat(path, ".", RandomHex(6), ".tmp");
  absl::Cleanup remove = [&] { unlink(temporary.c_str()); };
  {
    ITWIN_ASSIGN_OR_RETURN(FileDescriptor file,
                           OpenFile(temporary, O_WRONLY | O_CREAT | O_EXCL, mode));
    ITWIN_RETURN_IF_ERROR(WriteAll(file.get(), bytes, temporary));
    if (fsync(file.get()) != 0) return ErrnoStatus(errno, temporary);
  }
  if (rename(temporary.c_str(), path.c_str()) != 0) return ErrnoStatus(errno, path);
  std::move(remove).Cancel();
  const std::string directory = std::filesystem::path(path).parent_path().string();
  return FsyncDirectory(directory.empty() ? "." : directory);
}

absl::Status MakeDirectories(const std::string& path, unsigned mode) {
  if (mkdir(path.c_str(), mode) == 0) return absl::OkStatus();
  if (errno == ENOENT) {
    const std::string parent = std::filesystem::path(path).parent_path().string();
    if (parent.empty() || parent == path) return ErrnoStatus(ENOENT, path);
    ITWIN_RETURN_IF_ERROR(MakeDirectories(parent, mode));
    if (mkdir(path.c_str(), mode) == 0) return absl::OkStatus();
  }
  const int error = errno;
  struct stat info;
  if (error == EEXIST && stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) return absl::OkStatus();
  return ErrnoStatus(error, path);
}

absl::Status CheckRelativePath(absl::string_view path) {
  const auto wrong = [&](absl::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat("path '", absl::CHexEscape(path.substr(0, 200)), "' ", why));
  };
  if (path.empty()) return wrong("is empty");
  if (path.size() > kMaxPathBytes) return wrong(absl::StrCat("is longer than ", kMaxPathBytes, " bytes"));
  if (path[0] == '/') return wrong("starts with '/'; use a relative path");
  if (!IsValidUtf8(path)) return wrong("is not valid UTF-8");
  for (char c : path) {
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) return wrong("has a control character");
  }
  for (absl::string_view part : absl::StrSplit(path, '/')) {
    if (part.empty()) return wrong("has an empty part");
    if (part == "." || part == "..") return wrong("has a '.' or '..' part; it must stay inside its directory");
    if (part.size() > 255) return wrong("has a part longer than 255 bytes");
  }
  return absl::OkStatus();
}

bool IsValidUtf8(absl::string_view text) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = p + text.size();
  while (p < end) {
    const unsigned c = *p++;
    if (c < 0x80) continue;
    int more;
    unsigned min, code;
    if ((c & 0xe0) == 0xc0) {
      more = 1, min = 0x80, code = c & 0x1f;
    } else if ((c & 0xf0) == 0xe0) {
      more = 2, min = 0x800, code = c & 0x0f;
    } else if ((c & 0xf8) == 0xf0) {
      more = 3, min = 0x10000, code = c & 0x07;
    } else {
      return false;
    }
    if (end - p < more) return false;
    for (int i = 0; i < more; ++i) {
      if ((p[i] & 0xc0) != 0x80) return false;
      code = code << 6 | (p[i] & 0x3f);
    }
    if (code < min || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return false;
    p += more;
  }
  return true;
}

}  // namespace itwin

#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// The file operations that must be right everywhere: errors name the path and what the system said; no space
// or quota is kResourceExhausted, a missing file kNotFound, no permission kPermissionDenied, else kUnavailable.
namespace itwin {

absl::Status ErrnoStatus(int error, absl::string_view what);

// Owns a file descriptor; closes it at the end.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.Release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor() { Reset(); }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release();
  void Reset();

 private:
  int fd_ = -1;
};

absl::StatusOr<FileDescriptor> OpenFile(const std::string& path, int flags, unsigned mode = 0600);
// All of it, whatever the system takes at once.
absl::Status WriteAll(int fd, absl::string_view bytes, absl::string_view path);

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes = int64_t{64} << 20);
absl::Status ReadFileChunks(const std::string& path, int64_t chunk_bytes,
                            const std::function<absl::Status(absl::string_view)>& sink);
// Up to `max_bytes` from `offset`; shorter at the end of the file.
absl::StatusOr<std::string> ReadFileRange(const std::string& path, int64_t offset, int64_t max_bytes);

// Whole or not at all, and durable: temporary file in the same directory, fsync, rename, fsync of the directory.
absl::Status WriteFileAtomically(const std::string& path, absl::string_view bytes, unsigned mode = 0600);
absl::Status FsyncDirectory(const std::string& directory);
// With parents; an existing directory is fine.
absl::Status MakeDirectories(const std::string& path, unsigned mode = 0700);

// A relative path without "..", ".", empty parts, control characters or a leading "/", of at most 1,024 bytes
// of valid UTF-8: safe to create below a directory. kInvalidArgument says what is wrong.
absl::Status CheckRelativePath(absl::string_view path);
bool IsValidUtf8(absl::string_view text);

}  // namespace itwin

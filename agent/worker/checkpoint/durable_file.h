// Files that are whole or not there at all, even after a power cut.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace itwin::worker {

// Throws for a failed system call: ResourceError when the disk, quota or memory ran out (with what
// to do), else AppError. `doing` reads like "cannot write"; `error` is errno.
[[noreturn]] void ThrowIoError(const std::string& doing, const std::filesystem::path& path,
                               int error);

// Owns a file descriptor open for writing. Every failure throws as above.
class OutputFile {
 public:
  // Creates or truncates; with `append`, goes on at the end.
  explicit OutputFile(const std::filesystem::path& path, bool append = false);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;

  void Write(const void* data, size_t size);
  void Write(std::string_view text) { Write(text.data(), text.size()); }
  // Flushes to the disk and closes.
  void SyncAndClose();

 private:
  const std::filesystem::path path_;
  int fd_ = -1;
};

// Temporary file, fsync, rename.
void WriteFileDurably(const std::filesystem::path& path, std::string_view contents);

// Like WriteFileDurably, but only if there is no such file yet; says whether it wrote. Of several
// processes that try, exactly one does.
bool CreateFileDurably(const std::filesystem::path& path, std::string_view contents);

// Makes renames and new entries in the directory durable.
void SyncDirectory(const std::filesystem::path& path);

// mkdir -p.
void MakeDirectories(const std::filesystem::path& path);

std::string ReadWholeFile(const std::filesystem::path& path);

}  // namespace itwin::worker

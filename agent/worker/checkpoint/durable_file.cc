#include "agent/worker/checkpoint/durable_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <system_error>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// Differs between processes and hosts, so that two writers never share a temporary file.
std::filesystem::path TemporaryFor(const std::filesystem::path& path) {
  char host[256] = {};
  gethostname(host, sizeof(host) - 1);
  std::filesystem::path temporary = path;
  temporary += "." + std::string(host) + "." + std::to_string(getpid()) + ".tmp";
  return temporary;
}

// The contents on the disk under a name beside `path`, which is returned.
std::filesystem::path WriteTemporary(const std::filesystem::path& path, std::string_view contents) {
  std::filesystem::path temporary = TemporaryFor(path);
  try {
    OutputFile file(temporary);
    file.Write(contents);
    file.SyncAndClose();
  } catch (...) {
    unlink(temporary.c_str());
    throw;
  }
  return temporary;
}

}  // namespace

void ThrowIoError(const std::string& doing, const std::filesystem::path& path, int error) {
  std::string message = doing + " " + path.string() + ": " + std::strerror(error);
  if (error == ENOSPC || error == EDQUOT) {
    throw ResourceError(message +
                        "; free space on this file system (or raise the quota) and start again");
  }
  if (error == ENOMEM || error == EFBIG || error == EMFILE || error == ENFILE)
    throw ResourceError(message);
  throw AppError(message);
}

OutputFile::OutputFile(const std::filesystem::path& path, bool append) : path_(path) {
  fd_ = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | (append ? O_APPEND : O_TRUNC), 0644);
  if (fd_ < 0) ThrowIoError("cannot open", path_, errno);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
}

void OutputFile::Write(const void* data, size_t size) {
  const char* at = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = write(fd_, at, size);
    if (written < 0) {
      if (errno == EINTR) continue;
      ThrowIoError("cannot write", path_, errno);
    }
    at += written;
    size -= static_cast<size_t>(written);
  }
}

void OutputFile::SyncAndClose() {
  if (fsync(fd_) != 0) ThrowIoError("cannot write", path_, errno);
  const int result = close(fd_);
  fd_ = -1;
  if (result != 0) ThrowIoError("cannot write", path_, errno);
}

void WriteFileDurably(const std::filesystem::path& path, std::string_view contents) {
  const std::filesystem::path temporary = WriteTemporary(path, contents);
  if (rename(temporary.c_str(), path.c_str()) != 0) ThrowIoError("cannot create", path, errno);
  SyncDirectory(path.parent_path());
}

bool CreateFileDurably(const std::filesystem::path& path, std::string_view contents) {
  const std::filesystem::path temporary = WriteTemporary(path, contents);
  bool created = link(temporary.c_str(), path.c_str()) == 0;
  if (!created && errno != EEXIST) {  // a file system without hard links
    created = access(path.c_str(), F_OK) != 0 && rename(temporary.c_str(), path.c_str()) == 0;
  }
  unlink(temporary.c_str());
  SyncDirectory(path.parent_path());
  return created;
}

void SyncDirectory(const std::filesystem::path& path) {
  const int fd = open(path.empty() ? "." : path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0)
    return;  // some file systems do not let a directory be opened; the rename itself is done
  fsync(fd);
  close(fd);
}

void MakeDirectories(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) ThrowIoError("cannot create the directory", path, error.value());
}

std::string ReadWholeFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) ThrowIoError("cannot read", path, errno);
  std::ostringstream text;
  text << in.rdbuf();
  if (in.bad()) ThrowIoError("cannot read", path, EIO);
  return std::move(text).str();
}

}  // namespace itwin::worker

#include "agent/spool/tail.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

absl::StatusOr<std::string> ReadAt(int fd, int64_t offset, int64_t bytes, const std::string& path) {
  std::string out(static_cast<size_t>(bytes), '\0');
  size_t used = 0;
  while (used < out.size()) {
    const ssize_t got = pread(fd, out.data() + used, out.size() - used, offset + static_cast<int64_t>(used));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus(errno, path);
    if (got == 0) break;
    used += static_cast<size_t>(got);
  }
  out.resize(used);
  return out;
}

}  // namespace

absl::StatusOr<TailChunk> ReadTail(const std::string& path, bool lines, int64_t max_bytes,
                                   TailPosition* position) {
  // Opened each time: on NFS only that shows what another host wrote, and a replaced file is seen.
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor file, OpenFile(path, O_RDONLY | O_NONBLOCK | O_NOFOLLOW));
  struct stat info;
  if (fstat(file.get(), &info) != 0) return ErrnoStatus(errno, path);
  TailChunk chunk;
  chunk.offset = position->offset;
  if (!S_ISREG(info.st_mode)) return chunk;
  const int64_t size = info.st_size;
  if (size < position->offset) {
    if (!position->cut) {
      position->cut = true;
      position->skipping = lines;
      chunk.note = absl::StrCat("the file was cut to ", size, " bytes after ", position->offset,
                                " were read; it is read on from there when it has grown again");
    }
    position->scanned = position->offset;
    return chunk;
  }
  if (size > position->offset) position->cut = false;
  if (!lines) {
    ITWIN_ASSIGN_OR_RETURN(chunk.data,
                           ReadAt(file.get(), position->offset, std::min(max_bytes, size - position->offset), path));
    position->offset += static_cast<int64_t>(chunk.data.size());
    chunk.more = position->offset < size;
    return chunk;
  }

  position->scanned = std::max(position->scanned, position->offset);
  // The end of a line that is being left out. At most a few MiB at a time, so that one file cannot hold up the rest.
  for (int rounds = 0; position->skipping; ++rounds) {
    if (rounds == 4) {
      chunk.more = true;
      return chunk;
    }
    ITWIN_ASSIGN_OR_RETURN(
        const std::string part,
        ReadAt(file.get(), position->scanned, std::min(kMaxChunkBytes, size - position->scanned), path));
    if (part.empty()) return chunk;
    const size_t newline = part.find('\n');
    if (newline == std::string::npos) {
      position->scanned += static_cast<int64_t>(part.size());
      continue;
    }
    const int64_t next = position->scanned + static_cast<int64_t>(newline) + 1;
    chunk.note = absl::StrCat("a line of ", next - position->offset, " bytes was left out; a line may have ",
                              kMaxChunkBytes);
    position->offset = position->scanned = next;
    position->skipping = false;
    chunk.offset = next;
  }

  ITWIN_ASSIGN_OR_RETURN(
      std::string data,
      ReadAt(file.get(), position->offset, std::min(max_bytes, size - position->offset), path));
  size_t end = data.rfind('\n');
  if (end == std::string::npos && static_cast<int64_t>(data.size()) == max_bytes && max_bytes < kMaxChunkBytes) {
    // The budget is smaller than the line: lines are not split, so this one may take what a line may have.
    ITWIN_ASSIGN_OR_RETURN(
        data, ReadAt(file.get(), position->offset, std::min(kMaxChunkBytes, size - position->offset), path));
    end = data.find('\n');
  }
  if (end == std::string::npos) {
    position->scanned = position->offset + static_cast<int64_t>(data.size());
    if (static_cast<int64_t>(data.size()) >= kMaxChunkBytes) {
      position->skipping = true;
      chunk.more = position->scanned < size;
    }
    return chunk;
  }
  data.resize(end + 1);
  chunk.data = std::move(data);
  position->offset += static_cast<int64_t>(chunk.data.size());
  position->scanned = position->offset;
  chunk.more = position->offset < size;
  return chunk;
}

int64_t WholeLinesSize(const std::string& path) {
  const absl::StatusOr<FileDescriptor> file = OpenFile(path, O_RDONLY | O_NONBLOCK | O_NOFOLLOW);
  struct stat info;
  if (!file.ok() || fstat(file->get(), &info) != 0 || !S_ISREG(info.st_mode)) return 0;
  int64_t end = info.st_size;
  while (end > 0) {
    const int64_t begin = std::max<int64_t>(0, end - kMaxChunkBytes);
    const absl::StatusOr<std::string> part = ReadAt(file->get(), begin, end - begin, path);
    if (!part.ok()) return 0;
    const size_t newline = part->rfind('\n');
    if (newline != std::string::npos) return begin + static_cast<int64_t>(newline) + 1;
    end = begin;
  }
  return 0;
}

}  // namespace itwin::agent

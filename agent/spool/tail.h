#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace itwin::agent {

// One line is at most this long; a chunk carries at most this much.
inline constexpr int64_t kMaxChunkBytes = 1 << 20;

// A reader's place in an append-only file. Everything before `offset` was delivered or left out with a note.
struct TailPosition {
  int64_t offset = 0;
  int64_t scanned = 0;    // JSON Lines: no newline in [offset, scanned); never less than offset once used
  bool skipping = false;  // in a line longer than kMaxChunkBytes, or in the rest of one after the file was cut
  bool cut = false;       // the file was seen shorter than offset, and this was said
};

struct TailChunk {
  int64_t offset = 0;  // of data[0]
  std::string data;
  std::string note;    // what was left out before `offset`, in words
  bool more = false;   // the file holds more that could be delivered now
  bool empty() const { return data.empty() && note.empty(); }
};

// The next chunk of at most `max_bytes` (1..kMaxChunkBytes) beyond the position, which moves over it. With `lines`
// only whole lines: a line longer than kMaxChunkBytes is left out with a note, so that it cannot stall the stream.
// A file that has become shorter gives a note once, and goes on at the first line that begins beyond the
// position. kNotFound: no such file (yet).
absl::StatusOr<TailChunk> ReadTail(const std::string& path, bool lines, int64_t max_bytes, TailPosition* position);

// How far ReadTail with `lines` can ever get in a file that does not grow any more: behind its last newline.
int64_t WholeLinesSize(const std::string& path);

}  // namespace itwin::agent

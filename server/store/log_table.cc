#include "server/store/log_table.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"

namespace itwin::server::log_table {
namespace {

constexpr int64_t kMaxChunk = 64 << 10;   // bytes of one row
constexpr int64_t kSmallChunk = 8 << 10;  // the last row grows until then: a program that prints now and then

constexpr char kGetSizes[] = "SELECT size, dropped FROM log_sizes WHERE attempt = ? AND stream = ?";
constexpr char kSetSizes[] = "INSERT OR REPLACE INTO log_sizes (attempt, stream, size, dropped) VALUES (?, ?, ?, ?)";
constexpr char kLastChunk[] =
    "SELECT id, length(data), data FROM log_chunks WHERE attempt = ? AND stream = ? ORDER BY begin DESC LIMIT 1";
constexpr char kSetChunk[] = "UPDATE log_chunks SET data = ? WHERE id = ?";
constexpr char kInsertChunk[] = "INSERT INTO log_chunks (attempt, stream, begin, data) VALUES (?, ?, ?, ?)";
constexpr char kListChunks[] =
    "SELECT begin, data FROM log_chunks WHERE attempt = ? AND stream = ? AND begin > ? AND begin < ? ORDER BY begin";

struct Sizes {
  int64_t size = 0;
  int64_t dropped = 0;
};

Sizes GetSizes(SqliteConnection& c, int64_t attempt_row, v1::LogStream stream) {
  Query q(c, kGetSizes, attempt_row, static_cast<int>(stream));
  return q.Step() ? Sizes{q.Int(0), q.Int(1)} : Sizes{};
}

void AppendChunks(SqliteConnection& c, int64_t attempt_row, v1::LogStream stream, absl::string_view bytes,
                  Sizes* sizes) {
  if (bytes.empty()) return;
  int64_t id = 0;
  std::string grown;
  {
    Query q(c, kLastChunk, attempt_row, static_cast<int>(stream));
    if (q.Step() && q.Int(1) < kSmallChunk) {
      id = q.Int(0);
      grown = std::string(q.Bytes(2));
    }
  }
  if (id != 0) {
    const size_t more = std::min(bytes.size(), static_cast<size_t>(kMaxChunk) - grown.size());
    absl::StrAppend(&grown, bytes.substr(0, more));
    Query(c, kSetChunk, Borrowed{grown}, id).Run();
    sizes->size += static_cast<int64_t>(more);
    bytes.remove_prefix(more);
  }
  while (!bytes.empty()) {
    const absl::string_view chunk = bytes.substr(0, static_cast<size_t>(kMaxChunk));
    Query(c, kInsertChunk, attempt_row, static_cast<int>(stream), sizes->size, Borrowed{chunk}).Run();
    sizes->size += static_cast<int64_t>(chunk.size());
    bytes.remove_prefix(chunk.size());
  }
}

}  // namespace

void Append(SqliteConnection& c, int64_t attempt_row, v1::LogStream stream, absl::string_view bytes, int64_t limit) {
  if (bytes.empty()) return;
  Sizes sizes = GetSizes(c, attempt_row, stream);
  // Once something was dropped the closing sentence is there, and nothing follows it.
  const int64_t room = sizes.dropped > 0 ? 0 : std::max<int64_t>(0, limit - sizes.size);
  const absl::string_view kept = bytes.substr(0, static_cast<size_t>(room));
  AppendChunks(c, attempt_row, stream, kept, &sizes);
  if (kept.size() < bytes.size()) {
    if (sizes.dropped == 0) {
      AppendChunks(c, attempt_row, stream,
                   absl::StrCat("\n[itwin: this copy keeps the first ", limit,
                                " bytes; what the program printed after them is not here]\n"),
                   &sizes);
    }
    sizes.dropped += static_cast<int64_t>(bytes.size() - kept.size());
  }
  Query(c, kSetSizes, attempt_row, static_cast<int>(stream), sizes.size, sizes.dropped).Run();
}

LogSlice Read(SqliteConnection& c, int64_t attempt_row, v1::LogStream stream, int64_t offset, int limit) {
  const Sizes sizes = GetSizes(c, attempt_row, stream);
  LogSlice out;
  out.size = sizes.size;
  out.dropped_bytes = sizes.dropped;
  out.offset = offset < 0 ? std::max<int64_t>(0, sizes.size + std::max(offset, -sizes.size)) : std::min(offset, sizes.size);
  const int64_t end = std::min(sizes.size, out.offset + limit);
  Query q(c, kListChunks, attempt_row, static_cast<int>(stream), out.offset - kMaxChunk, end);
  while (q.Step()) {
    const int64_t begin = q.Int(0);
    const absl::string_view data = q.Bytes(1);
    const int64_t from = std::max<int64_t>(0, out.offset - begin);
    const int64_t to = std::min<int64_t>(static_cast<int64_t>(data.size()), end - begin);
    if (from < to) absl::StrAppend(&out.data, data.substr(static_cast<size_t>(from), static_cast<size_t>(to - from)));
  }
  out.next_offset = out.offset + static_cast<int64_t>(out.data.size());
  return out;
}

}  // namespace itwin::server::log_table

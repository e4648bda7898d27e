#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "common/ids.h"
#include "itwin/agent/v1/agent.pb.h"
#include "server/store/job_rows.h"

// What an attempt appends to its spool, as the store takes it: chunks of metrics.jsonl and node-<host>.jsonl become
// points and progress, chunks of the logs stay bytes. The format is docs/worker-contract.md. A line is taken
// whole or not at all; one that cannot be read is counted and skipped, whatever it is.
// Each node of an attempt has series of its own: "node/cpu_percent" in node-n1.jsonl becomes "node/n1/cpu_percent".
namespace itwin::server {

inline constexpr size_t kMaxLineBytes = 1 << 20;
inline constexpr int kMaxJsonDepth = 16;
inline constexpr size_t kMaxExampleBytes = 120;

// The names of series that an attempt has used lately, so that each is copied once. Of one thread. How many a job may have
// is the store's business.
class SeriesNames {
 public:
  size_t size() const { return known_.size(); }

 private:
  friend class SpoolParser;
  struct Slot {
    uint64_t batch = 0;  // the batch that `column` is of
    size_t column = 0;
  };
  absl::flat_hash_map<std::string, Slot> known_;
};

struct ParsedChunk {
  SpoolBatch batch;
  // About bad lines; empty when there were none. One sentence.
  std::string complaint;
  int64_t points = 0;
};

// Not thread-safe: one per reader thread, for all attempts it reads.
class SpoolParser {
 public:
  SpoolParser();
  ~SpoolParser();

  // Total: every chunk gives a batch over [chunk.offset, end), where `end` is behind its last whole line. (A
  // chunk of journal without any newline counts as one bad line.) `now` dates lines without a time.
  ParsedChunk Parse(const AttemptKey& attempt, const agent::v1::SpoolChunk& chunk, absl::Time now,
                    SeriesNames* names);

 private:
  struct Json;
  std::unique_ptr<Json> json_;
  uint64_t batch_ = 0;
};

// The sentence about points that the store did not take.
std::string RefusedComplaint(const SpoolBatch& batch, int64_t refused_points);
// How the spool calls it: "metrics.jsonl", "node-n1.jsonl", "stdout.log".
std::string SpoolFileName(agent::v1::SpoolFile file, const std::string& host);
// Where `cursor` stands in that file.
int64_t CursorOf(const agent::v1::SpoolCursor& cursor, agent::v1::SpoolFile file, const std::string& host);
void SetCursor(agent::v1::SpoolFile file, const std::string& host, int64_t offset, agent::v1::SpoolCursor* cursor);
// Everything up to the final sizes is stored.
bool ReachedEnd(const agent::v1::SpoolCursor& cursor, const agent::v1::SpoolSizes& sizes);

}  // namespace itwin::server

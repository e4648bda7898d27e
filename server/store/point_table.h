#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/store/job_rows.h"
#include "server/store/sqlite_connection.h"

// Metric points: packed segments, one per series and commit, in commit order per job. Statements throw as in
// job_table.h.
namespace itwin::server {

inline constexpr size_t kMaxSegmentPoints = 4096;    // so that summaries help plots of long series
inline constexpr int64_t kMaxBucketsPerAnswer = 50'000;    // of all series together; each gets fewer then

// What the writer remembers between commits, to save look-ups. Belongs to the writer's thread; must be cleared when
// anything is taken back.
class PointWriterCache {
 public:
  void Clear() {
    series_.clear();
    jobs_.clear();
  }

 private:
  friend class PointWriter;
  struct Job {
    int64_t last_sequence = 0;
    int64_t series_count = 0;
  };
  absl::flat_hash_map<std::pair<int64_t, std::string>, int64_t> series_;  // (job number, name) -> id
  absl::flat_hash_map<int64_t, Job> jobs_;
};

class PointWriter {
 public:
  PointWriter(SqliteConnection& connection, PointWriterCache& cache) : c_(connection), cache_(cache) {}
  // Stores what can be: returns how many points were refused (bad or too many series names). kInvalidArgument when the
  // columns' lengths differ, kResourceExhausted when the job has no more segments.
  absl::StatusOr<int64_t> Add(int64_t job, int attempt, const PointColumns& points);

 private:
  // 0: refused.
  int64_t SeriesId(int64_t job, PointWriterCache::Job& state, const std::string& name);
  PointWriterCache::Job& JobState(int64_t job);

  SqliteConnection& c_;
  PointWriterCache& cache_;
};

absl::StatusOr<PointsPage> ListPoints(SqliteConnection& c, int64_t job, int64_t cursor,
                                      const std::vector<std::string>& patterns, int limit);
absl::StatusOr<std::vector<v1::SeriesBuckets>> QuerySeries(SqliteConnection& c, int64_t job,
                                                           const std::vector<std::string>& patterns, int buckets);

}  // namespace itwin::server

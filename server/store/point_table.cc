#include "server/store/point_table.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/files.h"
#include "common/status_macros.h"
#include "server/store/keys.h"
#include "server/store/point_codec.h"

namespace itwin::server {
namespace {

constexpr size_t kMaxCached = 200'000;  // entries of the writer's cache; beyond it starts anew

constexpr int64_t kBlockOverhead = 8;   // points that take about as many bytes as the name of a series

constexpr char kFindSeries[] = "SELECT id FROM series WHERE job = ? AND name = ?";
constexpr char kCountSeries[] = "SELECT count(*) FROM series WHERE job = ?";
constexpr char kInsertSeries[] = "INSERT INTO series (job, name) VALUES (?, ?)";
constexpr char kListSeries[] = "SELECT id, name FROM series WHERE job = ? ORDER BY name";
constexpr char kGetSeriesName[] = "SELECT name FROM series WHERE id = ?";
constexpr char kLastSegment[] = "SELECT max(id) FROM point_segments WHERE id > ? AND id < ?";
constexpr char kInsertSegment[] =
    "INSERT INTO point_segments (id, series, attempt, points, min_step, max_step, min_time_us, max_time_us, min, max, "
    "last, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
constexpr char kListSegments[] =
    "SELECT id, series, attempt, points, data FROM point_segments WHERE id > ? AND id < ? ORDER BY id";
constexpr char kListSummaries[] =
    "SELECT series, points, min_step, max_step, min_time_us, max_time_us, min, max, last, data FROM point_segments "
    "WHERE id > ? AND id < ? ORDER BY id";

struct Range {
  int64_t min = std::numeric_limits<int64_t>::max();
  int64_t max = std::numeric_limits<int64_t>::min();
  void Add(int64_t low, int64_t high) {
    min = std::min(min, low);
    max = std::max(max, high);
  }
  void Add(int64_t value) { Add(value, value); }
};

// Smallest and largest that are numbers; NaN when none is.
struct Extremes {
  double min = std::numeric_limits<double>::quiet_NaN();
  double max = std::numeric_limits<double>::quiet_NaN();
  void Add(double low, double high) {
    // Written so that a NaN on either side gives way.
    if (!(min <= low) && !std::isnan(low)) min = low;
    if (!(max >= high) && !std::isnan(high)) max = high;
  }
};

struct Bucket {
  Range steps, times;
  Extremes values;
  double last = 0;
  bool used = false;
};

// A series while it is being reduced.
struct Reduction {
  std::string name;
  Range steps, times;
  int64_t points = 0;
  bool by_time = false;  // all points have the same step
  std::vector<Bucket> buckets;

  const Range& keys() const { return by_time ? times : steps; }
  size_t IndexOf(int64_t key) const {
    const auto offset = static_cast<unsigned __int128>(static_cast<uint64_t>(key) - static_cast<uint64_t>(keys().min));
    const auto span = static_cast<unsigned __int128>(static_cast<uint64_t>(keys().max) - static_cast<uint64_t>(keys().min)) + 1;
    return static_cast<size_t>(span <= buckets.size() ? offset : offset * buckets.size() / span);
  }
};

bool Matches(absl::string_view name, const std::vector<std::string>& patterns) {
  if (patterns.empty()) return true;
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    return absl::EndsWith(pattern, "*")
               ? absl::StartsWith(name, absl::string_view(pattern).substr(0, pattern.size() - 1))
               : name == pattern;
  });
}

bool IsSeriesName(absl::string_view name) {
  return !name.empty() && name.size() <= kMaxSeriesNameBytes && IsValidUtf8(name) &&
         std::none_of(name.begin(), name.end(), [](char ch) { return static_cast<unsigned char>(ch) < 0x20 || ch == 0x7f; });
}

}  // namespace

PointWriterCache::Job& PointWriter::JobState(int64_t job) {
  const auto [it, fresh] = cache_.jobs_.try_emplace(job);
  if (!fresh) return it->second;
  {
    Query q(c_, kLastSegment, SegmentRowId(job, 0), SegmentRowId(job + 1, 0));
    if (q.Step() && !q.IsNull(0)) it->second.last_sequence = SegmentSequence(q.Int(0));
  }
  Query q(c_, kCountSeries, job);
  if (q.Step()) it->second.series_count = q.Int(0);
  return it->second;
}

int64_t PointWriter::SeriesId(int64_t job, PointWriterCache::Job& state, const std::string& name) {
  const auto key = std::make_pair(job, name);
  if (const auto it = cache_.series_.find(key); it != cache_.series_.end()) return it->second;
  if (!IsSeriesName(name)) return 0;
  int64_t id = 0;
  {
    Query q(c_, kFindSeries, job, name);
    if (q.Step()) id = q.Int(0);
  }
  if (id == 0) {
    if (state.series_count >= kMaxSeriesPerJob) return 0;
    Query(c_, kInsertSeries, job, name).Run();
    id = c_.last_insert_rowid();
    ++state.series_count;
  }
  cache_.series_.emplace(key, id);
  return id;
}

absl::StatusOr<int64_t> PointWriter::Add(int64_t job, int attempt, const PointColumns& points) {
  const size_t count = points.values.size();
  if (points.steps.size() != count || points.times_us.size() != count) {
    return absl::InvalidArgumentError(absl::StrCat("series '", points.series.substr(0, 100), "': ", points.steps.size(),
                                                   " steps, ", points.times_us.size(), " times and ", count,
                                                   " values; a point has one of each"));
  }
  if (count == 0) return 0;
  if (cache_.series_.size() > kMaxCached || cache_.jobs_.size() > kMaxCached) cache_.Clear();
  PointWriterCache::Job& state = JobState(job);
  const int64_t series = SeriesId(job, state, points.series);
  if (series == 0) return static_cast<int64_t>(count);
  for (size_t first = 0; first < count; first += kMaxSegmentPoints) {
    const size_t last = std::min(count, first + kMaxSegmentPoints);
    if (state.last_sequence >= kMaxSegmentSequence) {
      return absl::ResourceExhaustedError("the job has as many blocks of points as the database can number");
    }
    Range steps, times;
    Extremes values;
    for (size_t i = first; i < last; ++i) {
      steps.Add(points.steps[i]);
      times.Add(points.times_us[i]);
      values.Add(points.values[i], points.values[i]);
    }
    const std::string data = EncodePoints(points, first, last);
    Query(c_, kInsertSegment, SegmentRowId(job, ++state.last_sequence), series, attempt,
          static_cast<int64_t>(last - first), steps.min, steps.max, times.min, times.max, values.min, values.max,
          points.values[last - 1], Borrowed{data})
        .Run();
  }
  return 0;
}

absl::StatusOr<PointsPage> ListPoints(SqliteConnection& c, int64_t job, int64_t cursor,
                                      const std::vector<std::string>& patterns, int limit) {
  PointsPage page;
  page.next_cursor = std::clamp<int64_t>(cursor, 0, kMaxSegmentSequence);
  struct Series {
    bool wanted = false;
    std::string name;
  };
  absl::flat_hash_map<int64_t, Series> series;
  absl::flat_hash_map<std::pair<int64_t, int>, size_t> block_of;  // (series, attempt)
  std::vector<int64_t> steps, times;
  std::vector<double> values;
  int64_t points = 0;
  Query q(c, kListSegments, SegmentRowId(job, page.next_cursor), SegmentRowId(job + 1, 0));
  while (q.Step()) {
    if (points >= limit) {
      page.end = false;
      break;
    }
    page.next_cursor = SegmentSequence(q.Int(0));
    const int64_t id = q.Int(1);
    const auto [it, fresh] = series.try_emplace(id);
    if (fresh) {
      Query name(c, kGetSeriesName, id);
      if (name.Step()) it->second.name = name.Text(0);
      it->second.wanted = Matches(it->second.name, patterns);
    }
    if (!it->second.wanted) continue;
    const int attempt = static_cast<int>(q.Int(2));
    const auto [position, new_block] = block_of.try_emplace({id, attempt}, page.blocks.size());
    if (new_block) {
      v1::PointBlock& block = page.blocks.emplace_back();
      block.set_series(it->second.name);
      block.set_attempt(attempt);
      points += kBlockOverhead;
    }
    steps.clear();
    times.clear();
    values.clear();
    ITWIN_RETURN_IF_ERROR(DecodePoints(q.Bytes(4), &steps, &times, &values));
    v1::PointBlock& block = page.blocks[position->second];
    block.mutable_steps()->Add(steps.begin(), steps.end());
    block.mutable_times_us()->Add(times.begin(), times.end());
    block.mutable_values()->Add(values.begin(), values.end());
    points += static_cast<int64_t>(values.size());
  }
  return page;
}

absl::StatusOr<std::vector<v1::SeriesBuckets>> QuerySeries(SqliteConnection& c, int64_t job,
                                                           const std::vector<std::string>& patterns, int buckets) {
  std::vector<Reduction> reductions;
  absl::flat_hash_map<int64_t, size_t> index;  // series id -> place in reductions
  {
    Query q(c, kListSeries, job);
    while (q.Step()) {
      std::string name = q.Text(1);
      if (!Matches(name, patterns)) continue;
      index.emplace(q.Int(0), reductions.size());
      reductions.emplace_back().name = std::move(name);
    }
  }
  {
    Query q(c, kListSummaries, SegmentRowId(job, 0), SegmentRowId(job + 1, 0));
    while (q.Step()) {
      const auto it = index.find(q.Int(0));
      if (it == index.end()) continue;
      Reduction& r = reductions[it->second];
      r.points += q.Int(1);
      r.steps.Add(q.Int(2), q.Int(3));
      r.times.Add(q.Int(4), q.Int(5));
    }
  }
  const auto share = static_cast<int64_t>(kMaxBucketsPerAnswer / std::max<size_t>(1, reductions.size()));
  for (Reduction& r : reductions) {
    r.by_time = r.steps.min == r.steps.max;
    r.buckets.resize(static_cast<size_t>(std::min({int64_t{buckets}, std::max<int64_t>(1, share), r.points})));
  }

  std::vector<int64_t> steps, times;
  std::vector<double> values;
  Query q(c, kListSummaries, SegmentRowId(job, 0), SegmentRowId(job + 1, 0));
  while (q.Step()) {
    const auto it = index.find(q.Int(0));
    if (it == index.end()) continue;
    Reduction& r = reductions[it->second];
    const int64_t low = q.Int(r.by_time ? 4 : 2), high = q.Int(r.by_time ? 5 : 3);
    if (const size_t place = r.IndexOf(low); place == r.IndexOf(high)) {
      Bucket& bucket = r.buckets[place];
      bucket.steps.Add(q.Int(2), q.Int(3));
      bucket.times.Add(q.Int(4), q.Int(5));
      bucket.values.Add(q.Double(6), q.Double(7));
      bucket.last = q.Double(8);
      bucket.used = true;
      continue;
    }
    steps.clear();
    times.clear();
    values.clear();
    ITWIN_RETURN_IF_ERROR(DecodePoints(q.Bytes(9), &steps, &times, &values));
    for (size_t i = 0; i < values.size(); ++i) {
      Bucket& bucket = r.buckets[r.IndexOf(r.by_time ? times[i] : steps[i])];
      bucket.steps.Add(steps[i]);
      bucket.times.Add(times[i]);
      bucket.values.Add(values[i], values[i]);
      bucket.last = values[i];
      bucket.used = true;
    }
  }

  std::vector<v1::SeriesBuckets> out;
  out.reserve(reductions.size());
  for (const Reduction& r : reductions) {
    if (r.points == 0) continue;
    v1::SeriesBuckets& series = out.emplace_back();
    series.set_series(r.name);
    series.set_points(r.points);
    for (const Bucket& bucket : r.buckets) {
      if (!bucket.used) continue;
      series.add_first_step(bucket.steps.min);
      series.add_last_step(bucket.steps.max);
      series.add_first_time_us(bucket.times.min);
      series.add_last_time_us(bucket.times.max);
      series.add_min(bucket.values.min);
      series.add_max(bucket.values.max);
      series.add_last(bucket.last);
    }
  }
  return out;
}

}  // namespace itwin::server

// Points through the real store: every bit back, whatever the chunks; plots against brute force.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "tests/testing/server_fixture.h"

namespace itwin::server {
namespace {

using itwin::testing::TempDirectory;
using testing::MetricsBatch;
using testing::OpenStore;
using testing::RunningJob;

constexpr uint64_t kSeed = 4711;

struct Stream {
  std::vector<int64_t> steps, times;
  std::vector<double> values;
};

double RandomValue(std::mt19937_64& random) {
  switch (random() % 12) {
    case 0:
      return std::numeric_limits<double>::quiet_NaN();
    case 1:
      return std::numeric_limits<double>::infinity() * (random() % 2 == 0 ? 1 : -1);
    default:
      return std::ldexp(static_cast<double>(static_cast<int64_t>(random())), -60);
  }
}

class PointsTest : public ::testing::Test {
 protected:
  // Commits `count` points of each series in random portions, some of them again.
  void Fill(std::mt19937_64& random, const std::vector<std::string>& series, int count, bool with_steps) {
    const AttemptKey key(job_.id, 1);
    int64_t offset = store_->GetAttempt(key)->cursor.metrics();
    std::map<std::string, int> left;
    for (const std::string& name : series) left[name] = count;
    int64_t step = 0, time = 1'700'000'000'000'000;
    while (!left.empty()) {
      std::vector<SpoolBatch> batches;
      const size_t in_commit = 1 + random() % 3;
      for (size_t b = 0; b < in_commit; ++b) {
        SpoolBatch batch = MetricsBatch(key, offset, offset + 10);
        offset += 10;
        for (const std::string& name : series) {
          if (!left.count(name) || random() % 3 == 0) continue;
          PointColumns columns;
          columns.series = name;
          // Now and then more than one stored block holds.
          int portion = static_cast<int>(random() % 20 == 0 ? 9000 : random() % 50);
          for (; portion > 0 && left[name] > 0; --portion, --left[name]) {
            step += static_cast<int64_t>(random() % 4);
            time += static_cast<int64_t>(random() % 2'000'000);
            columns.steps.push_back(with_steps ? step : 0);
            columns.times_us.push_back(time);
            columns.values.push_back(RandomValue(random));
          }
          Stream& stream = expected_[name];
          stream.steps.insert(stream.steps.end(), columns.steps.begin(), columns.steps.end());
          stream.times.insert(stream.times.end(), columns.times_us.begin(), columns.times_us.end());
          stream.values.insert(stream.values.end(), columns.values.begin(), columns.values.end());
          if (left[name] == 0) left.erase(name);
          batch.points.push_back(std::move(columns));
        }
        batches.push_back(std::move(batch));
      }
      if (random() % 4 == 0) batches.push_back(batches.back());  // sent twice
      ASSERT_OK(store_->CommitSpool(batches));
    }
  }

  TempDirectory directory_;
  std::unique_ptr<SqliteJobStore> store_ = OpenStore(directory_ / "itwin.db");
  JobRow job_ = RunningJob(*store_, "r");
  std::map<std::string, Stream> expected_;
};

TEST_F(PointsTest, EveryPointComesBackOnceAndInOrder) {
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  Fill(random, {"train/loss", "train/rmse", "test/rmse", "gpu"}, 12'000, true);
  JobRow other = RunningJob(*store_, "other");  // neighbours in the same table
  SpoolBatch foreign = MetricsBatch({other.id, 1}, 0, 1);
  foreign.points.push_back({"train/loss", {1}, {1}, {99}});
  ASSERT_OK(store_->CommitSpool({foreign}));

  for (const std::vector<std::string>& patterns :
       {std::vector<std::string>{}, {"train/*"}, {"test/rmse", "gpu"}, {"nothing"}}) {
    std::map<std::string, Stream> got;
    int64_t cursor = 0;
    bool end = false;
    while (!end) {
      const int limit = static_cast<int>(1 + random() % 5000);
      const auto page = store_->ListPoints(job_.id, cursor, patterns, limit);
      ASSERT_OK(page);
      for (const v1::PointBlock& block : page->blocks) {
        EXPECT_EQ(block.attempt(), 1);
        Stream& stream = got[block.series()];
        stream.steps.insert(stream.steps.end(), block.steps().begin(), block.steps().end());
        stream.times.insert(stream.times.end(), block.times_us().begin(), block.times_us().end());
        stream.values.insert(stream.values.end(), block.values().begin(), block.values().end());
      }
      EXPECT_TRUE(page->end || page->next_cursor > cursor);
      cursor = page->next_cursor;
      end = page->end;
    }
    size_t wanted = 0;
    for (const auto& [name, stream] : expected_) {
      const bool fits = patterns.empty() || (patterns[0] == "train/*" && name.rfind("train/", 0) == 0) ||
                        (patterns[0] == "test/rmse" && (name == "test/rmse" || name == "gpu"));
      if (!fits) continue;
      ++wanted;
      EXPECT_EQ(got[name].steps, stream.steps) << name;
      EXPECT_EQ(got[name].times, stream.times) << name;
      ASSERT_EQ(got[name].values.size(), stream.values.size()) << name;
      for (size_t i = 0; i < stream.values.size(); ++i) {
        ASSERT_EQ(std::bit_cast<uint64_t>(got[name].values[i]), std::bit_cast<uint64_t>(stream.values[i])) << name << i;
      }
    }
    EXPECT_EQ(got.size(), wanted);
    // A reader at the end hears of nothing until something comes.
    EXPECT_TRUE(store_->ListPoints(job_.id, cursor, patterns, 10)->end);
  }
}

bool Same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

TEST_F(PointsTest, PlotsEqualBruteForce) {
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  Fill(random, {"a", "b"}, 11'000, true);
  Fill(random, {"cpu"}, 3'000, false);  // no steps: by time
  for (const int buckets : {1, 7, 500, 10'000}) {
    const auto result = store_->QuerySeries(job_.id, {}, buckets);
    ASSERT_OK(result);
    ASSERT_EQ(result->size(), 3u);
    for (const v1::SeriesBuckets& series : *result) {
      const Stream& stream = expected_[series.series()];
      const std::vector<int64_t>& keys = series.series() == "cpu" ? stream.times : stream.steps;
      const int64_t low = *std::min_element(keys.begin(), keys.end());
      const int64_t high = *std::max_element(keys.begin(), keys.end());
      const auto count = static_cast<int64_t>(std::min<size_t>(static_cast<size_t>(buckets), keys.size()));
      struct Expected {
        int64_t first_step = INT64_MAX, last_step = INT64_MIN, first_time = INT64_MAX, last_time = INT64_MIN;
        double min = NAN, max = NAN, last = 0;
      };
      std::map<int64_t, Expected> brute;
      for (size_t i = 0; i < keys.size(); ++i) {
        const int64_t span = high - low + 1;
        const auto place = static_cast<int64_t>(span <= count ? keys[i] - low
                                                : static_cast<__int128>(keys[i] - low) * count / span);
        Expected& e = brute[place];
        e.first_step = std::min(e.first_step, stream.steps[i]);
        e.last_step = std::max(e.last_step, stream.steps[i]);
        e.first_time = std::min(e.first_time, stream.times[i]);
        e.last_time = std::max(e.last_time, stream.times[i]);
        e.min = std::fmin(e.min, stream.values[i]);
        e.max = std::fmax(e.max, stream.values[i]);
        e.last = stream.values[i];
      }
      EXPECT_EQ(series.points(), static_cast<int64_t>(keys.size()));
      ASSERT_EQ(series.min_size(), static_cast<int>(brute.size())) << series.series() << " " << buckets;
      int i = 0;
      for (const auto& [place, e] : brute) {
        ASSERT_EQ(series.first_step(i), e.first_step);
        ASSERT_EQ(series.last_step(i), e.last_step);
        ASSERT_EQ(series.first_time_us(i), e.first_time);
        ASSERT_EQ(series.last_time_us(i), e.last_time);
        ASSERT_TRUE(Same(series.min(i), e.min)) << series.series() << " " << place;
        ASSERT_TRUE(Same(series.max(i), e.max)) << series.series() << " " << place;
        ASSERT_TRUE(Same(series.last(i), e.last)) << series.series() << " " << place;
        ++i;
      }
    }
  }
  EXPECT_TRUE(store_->QuerySeries(job_.id, {"nothing"}, 10)->empty());
}

TEST_F(PointsTest, ExtremeStepsDoNotOverflow) {
  SpoolBatch batch = MetricsBatch({job_.id, 1}, 0, 10);
  batch.points.push_back({"x", {INT64_MIN, 0, INT64_MAX}, {INT64_MIN, 0, INT64_MAX}, {1, 2, 3}});
  ASSERT_OK(store_->CommitSpool({batch}));
  const auto result = store_->QuerySeries(job_.id, {}, 2);
  ASSERT_OK(result);
  ASSERT_EQ(result->front().last_size(), 2);
  EXPECT_EQ(result->front().last(0), 1);
  EXPECT_EQ(result->front().last(1), 3);
}

TEST_F(PointsTest, SeriesOfAJobAreBounded) {
  SpoolBatch batch = MetricsBatch({job_.id, 1}, 0, 10);
  for (int i = 0; i < 10'050; ++i) batch.points.push_back({absl::StrCat("s", i), {1}, {1}, {1}});
  ASSERT_OK(store_->CommitSpool({batch}));
  EXPECT_EQ(store_->GetAttempt({job_.id, 1})->bad_lines, 50);
  const auto result = store_->QuerySeries(job_.id, {}, 500);
  ASSERT_OK(result);
  EXPECT_EQ(result->size(), 10'000u);
}

}  // namespace
}  // namespace itwin::server

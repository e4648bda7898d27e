#include "server/dispatch/spool_ingest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace itwin::server {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const absl::Time kNow = absl::FromUnixSeconds(1'700'000'000);

class SpoolIngest : public ::testing::Test {
 protected:
  ParsedChunk Parse(const std::string& data, int64_t offset = 0) {
    agent::v1::SpoolChunk chunk;
    chunk.set_attempt(key_.text());
    chunk.set_file(agent::v1::SPOOL_FILE_METRICS);
    chunk.set_offset(offset);
    chunk.set_data(data);
    return parser_.Parse(key_, chunk, kNow, &names_);
  }

  const AttemptKey key_{*JobId::Parse("0123456789abcdef"), 1};
  SpoolParser parser_;
  SeriesNames names_;
};

TEST_F(SpoolIngest, PointsByColumn) {
  const ParsedChunk parsed = Parse(
      "{\"t\":1732370000.123,\"step\":1,\"metrics\":{\"train/loss\":0.5,\"lr\":1e-3}}\n"
      "{\"step\":2,\"metrics\":{\"train/loss\":0.25}}\n",
      1000);
  EXPECT_EQ(parsed.batch.begin_offset, 1000);
  EXPECT_EQ(parsed.batch.end_offset, 1000 + 68 + 42);
  EXPECT_EQ(parsed.points, 3);
  ASSERT_EQ(parsed.batch.points.size(), 2u);
  EXPECT_EQ(parsed.batch.points[0].series, "train/loss");
  EXPECT_THAT(parsed.batch.points[0].steps, ElementsAre(1, 2));
  EXPECT_THAT(parsed.batch.points[0].values, ElementsAre(0.5, 0.25));
  EXPECT_THAT(parsed.batch.points[0].times_us, ElementsAre(1732370000123000, absl::ToUnixMicros(kNow)));
  EXPECT_EQ(parsed.batch.points[1].series, "lr");
  EXPECT_EQ(parsed.batch.bad_lines, 0);
  EXPECT_EQ(parsed.complaint, "");
}

TEST_F(SpoolIngest, SeriesOfAnEarlierChunkStartAnew) {
  Parse("{\"metrics\":{\"a\":1,\"b\":1}}\n");
  const ParsedChunk parsed = Parse("{\"metrics\":{\"b\":2}}\n");
  ASSERT_EQ(parsed.batch.points.size(), 1u);
  EXPECT_EQ(parsed.batch.points[0].series, "b");
  EXPECT_THAT(parsed.batch.points[0].values, ElementsAre(2));
}

TEST_F(SpoolIngest, ProgressIsTheNewest) {
  const ParsedChunk parsed = Parse(
      "{\"progress\":{\"step\":1,\"steps\":10}}\n"
      "{\"t\":5,\"progress\":{\"step\":2,\"steps\":10,\"epoch\":1,\"epochs\":3,\"samples_per_second\":4.5,\"seconds_left\":8}}\n");
  ASSERT_TRUE(parsed.batch.progress.has_value());
  EXPECT_EQ(parsed.batch.progress->step(), 2);
  EXPECT_EQ(parsed.batch.progress->epochs(), 3);
  EXPECT_EQ(parsed.batch.progress->samples_per_second(), 4.5);
  EXPECT_EQ(parsed.batch.progress->updated_us(), 5'000'000);
  EXPECT_LT(Parse("{\"progress\":{}}\n").batch.progress->seconds_left(), 0) << "unknown";
}

TEST_F(SpoolIngest, ValuesThatJsonHasNoNumberFor) {
  const ParsedChunk parsed = Parse("{\"metrics\":{\"a\":\"NaN\",\"b\":\"Infinity\",\"c\":\"-Infinity\",\"d\":18446744073709551615}}\n");
  ASSERT_EQ(parsed.points, 4);
  EXPECT_TRUE(std::isnan(parsed.batch.points[0].values[0]));
  EXPECT_EQ(parsed.batch.points[1].values[0], HUGE_VAL);
  EXPECT_EQ(parsed.batch.points[2].values[0], -HUGE_VAL);
  EXPECT_EQ(parsed.batch.points[3].values[0], 18446744073709551615.0);
}

TEST_F(SpoolIngest, EachKindOfGarbageIsSkippedAlone) {
  const std::string long_name(201, 'n');
  const std::string bad[] = {
      "garbage",
      "{",
      "[1,2]",
      "17",
      "{\"metrics\":[1]}",
      "{\"metrics\":{\"a\":true}}",
      "{\"metrics\":{\"a\":\"nan\"}}",
      "{\"metrics\":{\"\":1}}",
      "{\"metrics\":{\"a\\u0000b\":1}}",
      "{\"metrics\":{\"a\\nb\":1}}",
      absl::StrCat("{\"metrics\":{\"", long_name, "\":1}}"),
      "{\"metrics\":{\"\xff\xfe\":1}}",
      "{\"step\":1.5,\"metrics\":{\"a\":1}}",
      "{\"step\":\"1\",\"metrics\":{\"a\":1}}",
      "{\"t\":-1,\"metrics\":{\"a\":1}}",
      "{\"t\":1e300,\"metrics\":{\"a\":1}}",
      "{\"t\":\"now\",\"metrics\":{\"a\":1}}",
      "{\"metrics\":{\"a\":1e999}}",
      "{\"metrics\":{\"a\":1}} trailing",
      "{\"metrics\":{\"a\":1}}{\"metrics\":{\"a\":1}}",
      "{\"progress\":7}",
      "{\"progress\":{\"step\":\"x\"}}",
      absl::StrCat("{\"metrics\":{\"a\":1},\"x\":", std::string(100, '['), std::string(100, ']'), "}"),
      std::string("{\"a\":\0}", 7),
  };
  for (const std::string& line : bad) {
    SCOPED_TRACE(line);
    const ParsedChunk parsed = Parse(absl::StrCat("{\"metrics\":{\"good\":1}}\n", line, "\n{\"metrics\":{\"good\":2}}\n"), 50);
    EXPECT_EQ(parsed.batch.bad_lines, 1);
    EXPECT_THAT(parsed.complaint, AllOf(HasSubstr("1 line of metrics.jsonl"), HasSubstr("at byte 73")));
    EXPECT_LE(parsed.complaint.size(), 400u);
    ASSERT_EQ(parsed.batch.points.size(), 1u);
    EXPECT_THAT(parsed.batch.points[0].values, ElementsAre(1, 2));
  }
}

TEST_F(SpoolIngest, TheFirstOfManyBadLinesIsShown) {
  std::string data;
  for (int i = 0; i < 1000; ++i) absl::StrAppend(&data, "bad", i, "\n");
  const ParsedChunk parsed = Parse(data);
  EXPECT_EQ(parsed.batch.bad_lines, 1000);
  EXPECT_THAT(parsed.complaint, AllOf(HasSubstr("1000 lines"), HasSubstr("bad0")));
}

TEST_F(SpoolIngest, UnknownKeysAndBlankLinesAreFine) {
  const ParsedChunk parsed = Parse("\n  \n\r\n{\"t\":1,\"note\":{\"x\":[1,2,{}]},\"metrics\":{\"a\":1}}\r\n");
  EXPECT_EQ(parsed.batch.bad_lines, 0);
  EXPECT_EQ(parsed.points, 1);
}

TEST_F(SpoolIngest, UnfinishedLastLineIsLeftForLater) {
  const ParsedChunk parsed = Parse("{\"metrics\":{\"a\":1}}\n{\"metr");
  EXPECT_EQ(parsed.batch.end_offset, 20);
  EXPECT_EQ(parsed.batch.bad_lines, 0);
  EXPECT_EQ(parsed.points, 1);
}

TEST_F(SpoolIngest, ChunkWithoutALineIsOneBadLine) {
  const ParsedChunk parsed = Parse(std::string(1 << 20, 'x'));
  EXPECT_EQ(parsed.batch.end_offset, 1 << 20);
  EXPECT_EQ(parsed.batch.bad_lines, 1);
}

TEST_F(SpoolIngest, NamesAtTheEdge) {
  EXPECT_EQ(Parse(absl::StrCat("{\"metrics\":{\"", std::string(200, 'n'), "\":1}}\n")).points, 1);
  EXPECT_EQ(Parse("{\"metrics\":{\"größe/Ω\":1}}\n").points, 1);
}

TEST_F(SpoolIngest, EachNodeHasSeriesOfItsOwn) {
  const std::string line = "{\"t\":1,\"host\":\"n1\",\"metrics\":{\"node/cpu_percent\":50,\"own\":1}}\n";
  agent::v1::SpoolChunk chunk;
  chunk.set_file(agent::v1::SPOOL_FILE_NODE);
  chunk.set_data(line);
  for (const std::string host : {"n1", "n2", "n1"}) {
    chunk.set_host(host);
    const ParsedChunk parsed = parser_.Parse(key_, chunk, kNow, &names_);
    ASSERT_EQ(parsed.batch.points.size(), 2u);
    EXPECT_EQ(parsed.batch.points[0].series, "node/" + host + "/cpu_percent");
    EXPECT_EQ(parsed.batch.points[1].series, "own");
  }
  // In the program's own file a name is a name.
  EXPECT_EQ(Parse(line).batch.points[0].series, "node/cpu_percent");
}

TEST_F(SpoolIngest, RemembersABoundedNumberOfNames) {
  for (int round = 0; round < 5; ++round) {
    std::string data;
    for (int i = 0; i < 10'000; ++i) absl::StrAppend(&data, "{\"metrics\":{\"s", round, "/", i, "\":1}}\n");
    const ParsedChunk parsed = Parse(data);
    EXPECT_EQ(parsed.batch.points.size(), 10'000u);
    EXPECT_EQ(parsed.batch.points[9'999].series, absl::StrCat("s", round, "/9999"));
    EXPECT_LE(names_.size(), 30'000u);
  }
}

TEST_F(SpoolIngest, LogsStayBytes) {
  agent::v1::SpoolChunk chunk;
  chunk.set_file(agent::v1::SPOOL_FILE_STDOUT);
  chunk.set_offset(7);
  chunk.set_data(std::string("\0\xff{\n", 4));
  const ParsedChunk parsed = parser_.Parse(key_, chunk, kNow, &names_);
  EXPECT_EQ(parsed.batch.log, chunk.data());
  EXPECT_EQ(parsed.batch.end_offset, 11);
  EXPECT_EQ(parsed.batch.bad_lines, 0);
}

TEST_F(SpoolIngest, Cursors) {
  agent::v1::SpoolCursor cursor;
  agent::v1::SpoolSizes sizes;
  EXPECT_TRUE(ReachedEnd(cursor, sizes));
  (*sizes.mutable_nodes())["n1"] = 10;
  EXPECT_FALSE(ReachedEnd(cursor, sizes));
  SetCursor(agent::v1::SPOOL_FILE_NODE, "n1", 10, &cursor);
  EXPECT_TRUE(ReachedEnd(cursor, sizes));
  sizes.set_stderr_log(1);
  EXPECT_FALSE(ReachedEnd(cursor, sizes));
  SetCursor(agent::v1::SPOOL_FILE_STDERR, "", 1, &cursor);
  EXPECT_TRUE(ReachedEnd(cursor, sizes));
}

// Damaged lines of every sort never take anything else with them, and never crash.
TEST_F(SpoolIngest, SurvivesRandomDamage) {
  std::mt19937 random(20240611);  // printed by its place here: fixed
  const std::string good = "{\"t\":1732370000.5,\"step\":12,\"metrics\":{\"train/loss\":0.5,\"x\":\"NaN\"},\"progress\":{\"step\":3}}";
  for (int round = 0; round < 3000; ++round) {
    std::string data;
    const int lines = 1 + static_cast<int>(random() % 8);
    int untouched = 0;
    for (int i = 0; i < lines; ++i) {
      std::string line = good;
      if (random() % 2 == 0) {
        for (int hit = 0; hit < 3; ++hit) {
          const size_t at = random() % line.size();
          switch (random() % 3) {
            case 0: line[at] = static_cast<char>(random() % 256); break;
            case 1: line.erase(at, random() % 20); break;
            default: line.insert(at, std::string(random() % 20, static_cast<char>(random() % 256)));
          }
          if (line.empty()) line = "x";
        }
      } else {
        ++untouched;
      }
      absl::StrAppend(&data, line, "\n");
    }
    const ParsedChunk parsed = Parse(data, 5);
    EXPECT_EQ(parsed.batch.end_offset, 5 + static_cast<int64_t>(data.size()));
    int64_t losses = 0;
    for (const PointColumns& columns : parsed.batch.points) {
      ASSERT_EQ(columns.steps.size(), columns.values.size());
      ASSERT_EQ(columns.times_us.size(), columns.values.size());
      if (columns.series == "train/loss") losses = static_cast<int64_t>(columns.values.size());
    }
    ASSERT_GE(losses, untouched);
  }
}

}  // namespace
}  // namespace itwin::server

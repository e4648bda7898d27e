#include "agent/worker/report/metric_sink.h"

#include <cmath>
#include <limits>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "agent/worker/error.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using testing::Scratch;
using Json = nlohmann::json;

std::vector<Json> Lines(const std::string& text) {
  EXPECT_TRUE(text.empty() || text.back() == '\n');
  std::vector<Json> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
  return lines;
}

TEST(MetricSink, EveryLineIsWholeAndInOrder) {
  const Scratch scratch;
  constexpr int kLines = 20000;
  {
    const auto sink = OpenMetricFile(scratch / "m");
    for (int i = 1; i <= kLines; ++i) sink->Write(i, {{"train/loss", 1.0 / i}, {"x", i}});
    sink->Flush();
    EXPECT_EQ(Lines(scratch.Read("m")).size(), static_cast<size_t>(kLines));
    sink->Write(kLines + 1, {{"x", 1}});
  }
  const std::vector<Json> lines = Lines(scratch.Read("m"));
  ASSERT_EQ(lines.size(), static_cast<size_t>(kLines + 1));
  for (int i = 1; i <= kLines; ++i) {
    EXPECT_EQ(lines[i - 1]["step"], i);
    EXPECT_EQ(lines[i - 1]["metrics"]["train/loss"], 1.0 / i);  // every bit
  }
  EXPECT_GT(lines[0]["t"], 1.6e9);
}

TEST(MetricSink, GoesOnInAFileThatIsThere) {
  const Scratch scratch;
  scratch.Write("m", "{}\n");
  OpenMetricFile(scratch / "m")->Write(1, {{"a", 2}});
  EXPECT_EQ(Lines(scratch.Read("m")).size(), 2u);
}

TEST(MetricSink, SpellsWhatJsonHasNoNumberFor) {
  const Scratch scratch;
  const double infinity = std::numeric_limits<double>::infinity();
  OpenMetricFile(scratch / "m")
      ->Write(1, {{"a\"b\n", std::nan("")}, {"p", infinity}, {"n", -infinity}});
  const Json metrics = Lines(scratch.Read("m"))[0]["metrics"];
  EXPECT_EQ(metrics["a\"b\n"], "NaN");
  EXPECT_EQ(metrics["p"], "Infinity");
  EXPECT_EQ(metrics["n"], "-Infinity");
}

TEST(MetricSink, ProgressHasItsFields) {
  const Scratch scratch;
  OpenMetricFile(scratch / "m")
      ->Write({.step = 5,
               .steps = 10,
               .epoch = 1,
               .epochs = 2,
               .samples_per_second = 3.5,
               .seconds_left = 4.0});
  const Json progress = Lines(scratch.Read("m"))[0]["progress"];
  EXPECT_EQ(
      progress,
      Json::parse(
          R"({"step":5,"steps":10,"epoch":1,"epochs":2,"samples_per_second":3.5,"seconds_left":4})"));
}

TEST(MetricSink, FullDiskIsAResourceError) {
  const auto sink = OpenMetricFile("/dev/full");
  try {
    sink->Write(1, {{"a", 1}});
    sink->Flush();
    FAIL();
  } catch (const WorkerError& e) {
    EXPECT_EQ(e.failure, FailureClass::kResource);
  }
  EXPECT_THROW(sink->Write(2, {{"a", 1}}), WorkerError);
}

}  // namespace
}  // namespace itwin::worker

#include "client/cli/render.h"

#include <gmock/gmock.h>

#include <cmath>

namespace itwin::cli {
namespace {

using ::testing::ElementsAre;

constexpr Glyphs kUnicode{true};
constexpr Glyphs kAscii{false};

TEST(Render, KnowsTheWidthOfText) {
  EXPECT_EQ(DisplayWidth("abc"), 3);
  EXPECT_EQ(DisplayWidth("é→█"), 3);
  EXPECT_EQ(DisplayWidth("日本"), 4);
  EXPECT_EQ(DisplayWidth("e\u0301"), 1);
  EXPECT_EQ(DisplayWidth("😀"), 2);
  EXPECT_EQ(DisplayWidth(""), 0);
  EXPECT_EQ(DisplayWidth("\xff\xc3"), 2);  // broken bytes do not break us
}

TEST(Render, CutsToTheWidth) {
  EXPECT_EQ(Truncated("hello", 5, kUnicode), "hello");
  EXPECT_EQ(Truncated("hello!", 5, kUnicode), "hell…");
  EXPECT_EQ(Truncated("hello!", 5, kAscii), "hell~");
  EXPECT_EQ(Truncated("日本語", 4, kUnicode), "日…");
  EXPECT_EQ(Truncated("abc", 0, kUnicode), "");
  for (int width = 0; width < 20; ++width) {
    EXPECT_LE(DisplayWidth(Truncated("a日b本c語→→é", width, kUnicode)), width) << width;
  }
}

TEST(Render, KeepsControlCharactersFromTheTerminal) {
  EXPECT_EQ(Printable("a\x1b[31mb\nc\td"), "a?[31mb?c?d");
  EXPECT_EQ(Printable("é日"), "é日");
  EXPECT_EQ(Printable("\u009b31m"), "?31m");
}

TEST(Render, DrawsBarsOfExactWidth) {
  EXPECT_EQ(Bar(0.5, 4, kUnicode), "━━──");
  EXPECT_EQ(Bar(0.625, 4, kUnicode), "━━╸─");
  EXPECT_EQ(Bar(1, 4, kAscii), "####");
  EXPECT_EQ(Bar(0, 4, kAscii), "----");
  for (double f : {-1.0, 0.0, 0.3, 1.0, 7.0, std::nan("")}) EXPECT_EQ(DisplayWidth(Bar(f, 10, kUnicode)), 10) << f;
  EXPECT_EQ(Bar(0.5, 0, kUnicode), "");
}

TEST(Render, DrawsSparklines) {
  EXPECT_EQ(Sparkline({8, 7, 6, 5, 4, 3, 2, 1}, 8, kUnicode), "█▇▆▅▄▃▂▁");
  EXPECT_EQ(Sparkline({1, 1, 1}, 8, kUnicode), "▁▁▁");
  EXPECT_EQ(Sparkline({1, std::nan(""), 2}, 3, kUnicode), "▁ █");
  EXPECT_EQ(Sparkline({}, 8, kUnicode), "");
  EXPECT_EQ(Sparkline({0, 10}, 8, kAscii), "_#");
  std::vector<double> many(1000);
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<double>(i);
  EXPECT_EQ(DisplayWidth(Sparkline(many, 12, kUnicode)), 12);
}

TEST(Render, WritesNumbersTimesAndSizes) {
  EXPECT_EQ(NumberText(0.052134), "0.05213");
  EXPECT_EQ(NumberText(412), "412");
  EXPECT_EQ(DurationText(absl::Seconds(45)), "45s");
  EXPECT_EQ(DurationText(absl::Seconds(130)), "2m10s");
  EXPECT_EQ(DurationText(absl::Seconds(3900)), "1h05m");
  EXPECT_EQ(DurationText(absl::Hours(76)), "3d04h");
  EXPECT_EQ(DurationText(-absl::Hours(76)), "0s");
  EXPECT_EQ(BytesText(12), "12 B");
  EXPECT_EQ(BytesText(12'900'000), "12.3 MiB");
  EXPECT_EQ(TimeText(0), "-");
  EXPECT_EQ(StateText(v1::JOB_STATE_SUBMIT_UNKNOWN), "SUBMIT_UNKNOWN");
  EXPECT_EQ(StateText(static_cast<v1::JobState>(77)), "STATE 77");
  EXPECT_EQ(FailureText(v1::FAILURE_CLASS_INFRA), "infra");
}

TEST(Render, ShortensIdsAsFarAsTheyStayUnique) {
  EXPECT_THAT(ShortIds({"aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"}), ElementsAre("aaaaaaaa", "bbbbbbbb"));
  EXPECT_THAT(ShortIds({"aaaaaaaaaa111111", "cccccccccccccccc", "aaaaaaaaaa222222"}),
              ElementsAre("aaaaaaaaaa1", "cccccccc", "aaaaaaaaaa2"));
  EXPECT_THAT(ShortIds({}), ElementsAre());
}

}  // namespace
}  // namespace itwin::cli

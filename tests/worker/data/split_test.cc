#include "agent/worker/data/split.h"

#include <algorithm>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/spec/parse.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::UserErrorOf;

const std::vector<int64_t>& Of(const SplitIndices& splits, Split split) {
  return splits[static_cast<size_t>(split)];
}

TEST(Split, TrainingIsAllThatIsNamedNowhereElse) {
  const SplitIndices all = DrawSplits({}, 4, false, 0);
  EXPECT_THAT(Of(all, Split::kTrain), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(Of(all, Split::kValidation), IsEmpty());
  EXPECT_THAT(Of(all, Split::kTest), IsEmpty());

  const SplitIndices some =
      DrawSplits({.validation = IndexRange{1, 2}, .test = IndexRange{4, 6}}, 6, false, 0);
  EXPECT_THAT(Of(some, Split::kTrain), ElementsAre(0, 2, 3));
  EXPECT_THAT(Of(some, Split::kValidation), ElementsAre(1));
  EXPECT_THAT(Of(some, Split::kTest), ElementsAre(4, 5));

  const SplitIndices named =
      DrawSplits({.train = IndexRange{0, 2}, .test = IndexRange{3, 4}}, 4, false, 0);
  EXPECT_THAT(Of(named, Split::kTrain), ElementsAre(0, 1));
}

TEST(Split, FractionsAreDrawnBySeedAndPartTheTrainingRange) {
  const SplitSpec spec = {
      .train = IndexRange{100, 300}, .validation_fraction = 0.1, .test_fraction = 0.25};
  const SplitIndices first = DrawSplits(spec, 400, false, 7),
                     again = DrawSplits(spec, 400, false, 7),
                     other = DrawSplits(spec, 400, false, 8);
  EXPECT_EQ(first, again);
  EXPECT_NE(first, other);
  EXPECT_EQ(Of(first, Split::kTrain).size(), 130u);
  EXPECT_EQ(Of(first, Split::kValidation).size(), 20u);
  EXPECT_EQ(Of(first, Split::kTest).size(), 50u);
  std::vector<int64_t> all;
  for (const auto& part : first) {
    EXPECT_TRUE(std::is_sorted(part.begin(), part.end()));
    all.insert(all.end(), part.begin(), part.end());
  }
  std::sort(all.begin(), all.end());
  std::vector<int64_t> range(200);
  std::iota(range.begin(), range.end(), 100);
  EXPECT_EQ(all, range);  // each sample once
}

TEST(Split, SaysFieldValueAndWhatWouldBeRight) {
  const auto error = [](const SplitSpec& spec, int64_t samples = 132, bool separate_test = false) {
    return UserErrorOf([&] { DrawSplits(spec, samples, separate_test, 0); });
  };
  EXPECT_THAT(error({.test = IndexRange{108, 140}}),
              AllOf(HasSubstr("train.data.split.test: \"108..140\" reaches beyond"),
                    HasSubstr("\"0..132\"")));
  EXPECT_THAT(error({.train = IndexRange{-1, 4}}), HasSubstr("train.data.split.train"));
  EXPECT_THAT(error({.validation = IndexRange{5, 5}}),
              HasSubstr("train.data.split.validation: \"5..5\" is empty"));
  EXPECT_THAT(error({.train = IndexRange{0, 110}, .test = IndexRange{108, 132}}),
              HasSubstr("shares sample 108"));
  EXPECT_THAT(error({.test_fraction = 1}), HasSubstr("train.data.split.test_fraction"));
  EXPECT_THAT(error({.validation_fraction = -0.5}),
              HasSubstr("train.data.split.validation_fraction"));
  EXPECT_THAT(error({.validation_fraction = 0.001}), HasSubstr("is none"));
  EXPECT_THAT(error({.validation_fraction = 0.5, .test_fraction = 0.5}),
              HasSubstr("no samples for training"));
  EXPECT_THAT(error({.test = IndexRange{0, 132}}), HasSubstr("no samples for training"));
  EXPECT_THAT(error({}, 0), HasSubstr("no samples"));
  EXPECT_THAT(error({.test_fraction = 0.1}, 132, true), HasSubstr("test files of their own"));
}

TEST(Split, TheParserNamesKeysThatContradictEachOther) {
  const auto error = [](const char* split) {
    return UserErrorOf([&] {
      ParseData({{"npz", "a.npz"}, {"split", nlohmann::json::parse(split)}});
    });
  };
  EXPECT_THAT(error(R"({"by_hash": true})"),
              AllOf(HasSubstr("train.data.split.by_hash"), HasSubstr("`validation_fraction`"),
                    HasSubstr("`test_fraction`")));
  EXPECT_THAT(error(R"({"by_hash": true, "test": "0..5"})"), HasSubstr("train.data.split.by_hash"));
  EXPECT_THAT(error(R"({"test": "0..5", "test_fraction": 0.1})"),
              AllOf(HasSubstr("train.data.split.test_fraction"), HasSubstr("`test`")));
  EXPECT_THAT(error(R"({"test": "1982-01..1982-05", "test_fraction": 0.1})"), HasSubstr("`test`"));
  EXPECT_THAT(error(R"({"validation": "0..5", "validation_fraction": 0.1})"),
              AllOf(HasSubstr("train.data.split.validation_fraction"), HasSubstr("`validation`")));
  EXPECT_EQ(error(R"({"by_hash": true, "test_fraction": 0.1, "validation": "0..5"})"), "");
  EXPECT_EQ(error(R"({"by_hash": false, "test": "0..5", "test_fraction": 0})"), "");
}

TEST(Split, ByHashASampleStaysWhereItIsWhenOthersAreAdded) {
  const SplitSpec spec{.validation_fraction = 0.2, .test_fraction = 0.1, .by_hash = true};
  const SplitIndices few = DrawSplits(spec, 2000, false, 5), more = DrawSplits(spec, 3000, false, 5);
  for (size_t split = 0; split < 3; ++split) {
    std::vector<int64_t> of_first;
    for (const int64_t sample : more[split]) {
      if (sample < 2000) of_first.push_back(sample);
    }
    EXPECT_EQ(few[split], of_first);
  }
  EXPECT_NEAR(static_cast<double>(more[1].size()) / 3000, 0.2, 0.03);
  EXPECT_NEAR(static_cast<double>(more[2].size()) / 3000, 0.1, 0.03);
  EXPECT_NE(few[2], DrawSplits(spec, 2000, false, 6)[2]) << "the seed counts";
}

}  // namespace
}  // namespace itwin::worker

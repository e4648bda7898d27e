#include "agent/worker/model/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::UserErrorOf;

TEST(Options, GivenOnesOverrideDefaultsAndAllAreRecorded) {
  OptionReader options("net", {{"width", 8.0},
                               {"dropout", 0.5},
                               {"hidden", {1, 2.0}},
                               {"deep", true},
                               {"absent", nullptr}});
  EXPECT_EQ(options.Int("width", 4, 1, 100), 8);
  EXPECT_EQ(options.Int("depth", 3, 1, 100), 3);
  EXPECT_EQ(options.Number("dropout", 0, 0, 1), 0.5);
  EXPECT_TRUE(options.Bool("deep", false));
  EXPECT_EQ(options.Int("absent", 6, 1, 100), 6);
  EXPECT_THAT(options.Ints("hidden", {9}, 1, 3, 1, 100), ElementsAre(1, 2));
  options.Finish();
  EXPECT_EQ(
      options.resolved(),
      nlohmann::json::parse(
          R"({"width": 8, "depth": 3, "dropout": 0.5, "deep": true, "absent": 6, "hidden": [1, 2]})"));
}

TEST(Options, UnknownOnesAreErrorsThatNameTheNearest) {
  OptionReader options("net", {{"hiden", {1}}});
  options.Ints("hidden", {9}, 1, 3, 1, 100);
  options.Number("dropout", 0, 0, 1);
  EXPECT_THAT(UserErrorOf([&] { options.Finish(); }),
              AllOf(HasSubstr("train.model.options.hiden"), HasSubstr("did you mean \"hidden\""),
                    HasSubstr("dropout, hidden")));
  EXPECT_THAT(UserErrorOf([] {
                OptionReader("net", {1, 2});
              }),
              HasSubstr("must be names with values"));
}

TEST(Options, WrongTypesAndValuesNamePathAndBounds) {
  OptionReader options(
      "net",
      {{"a", 0}, {"b", 1.5}, {"c", "x"}, {"d", {1, 0}}, {"e", nlohmann::json::array()}, {"f", 2}});
  EXPECT_THAT(UserErrorOf([&] { options.Int("a", 1, 1, 9); }),
              AllOf(HasSubstr("train.model.options.a: 0"), HasSubstr("1 to 9")));
  EXPECT_THAT(UserErrorOf([&] { options.Int("b", 1, 1, 9); }), HasSubstr("whole number"));
  EXPECT_THAT(UserErrorOf([&] { options.Int("c", 1, 1, 9); }), HasSubstr("\"x\""));
  EXPECT_THAT(UserErrorOf([&] { options.Bool("c", true); }), HasSubstr("true or false"));
  EXPECT_THAT(UserErrorOf([&] { options.Ints("d", {1}, 1, 3, 1, 9); }), HasSubstr("[1,0]"));
  EXPECT_THAT(UserErrorOf([&] { options.Ints("e", {1}, 1, 3, 1, 9); }),
              HasSubstr("list of 1 to 3"));
  EXPECT_THAT(UserErrorOf([&] { options.Number("f", 0, 0, 0.95); }), HasSubstr("0.0 to 0.95"));
}

}  // namespace
}  // namespace itwin::worker

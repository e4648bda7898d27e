#include "agent/worker/data/csv.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/data/array_values.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Scratch;
using testing::UserErrorOf;
using testing::Values;

TEST(Csv, ReadsNamedColumnsInTheOrderAskedFor) {
  const Scratch scratch;
  scratch.Write("a.csv",
                "\xef\xbb\xbfname, height ,\"wind, \"\"u\"\"\",class\r\n"
                "\"a, b\",1.5,-2e1,0\r\n"
                "\"two\nlines\", +3 ,\"0.25\",2\r\n"
                "\r\n"
                "c,nan,7,1");
  const CsvTable table = ReadCsv(scratch / "a.csv", {"wind, \"u\"", "height"}, {"class"}, true);
  EXPECT_THAT(table.inputs.shape, ElementsAre(3, 2));
  const auto inputs = Values<float>(table.inputs);
  EXPECT_EQ(inputs[0], -20);
  EXPECT_EQ(inputs[1], 1.5);
  EXPECT_EQ(inputs[2], 0.25);
  EXPECT_EQ(inputs[3], 3);
  EXPECT_TRUE(std::isnan(inputs[5]));
  EXPECT_THAT(table.targets.shape, ElementsAre(3));
  EXPECT_THAT(Values<int64_t>(table.targets), ElementsAre(0, 2, 1));

  const CsvTable numbers = ReadCsv(scratch / "a.csv", {"wind, \"u\""}, {"height", "class"}, false);
  EXPECT_THAT(numbers.targets.shape, ElementsAre(3, 2));
  EXPECT_EQ(Values<float>(numbers.targets)[2], 3);
}

TEST(Csv, RefusesNamesThatDoNotTellOneColumn) {
  const Scratch scratch;
  scratch.Write("a.csv", "temp,rain,temp,note,note\n1,2,3,4,5\n");
  const auto error = [&](const std::vector<std::string>& inputs,
                         const std::vector<std::string>& targets) {
    return UserErrorOf([&] { ReadCsv(scratch / "a.csv", inputs, targets, false); });
  };
  EXPECT_THAT(error({"temp"}, {"rain"}), AllOf(HasSubstr("train.data.csv.inputs: column \"temp\""),
                                               HasSubstr("a.csv has it 2 times")));
  EXPECT_THAT(error({"rain"}, {"note"}), HasSubstr("train.data.csv.targets: column \"note\""));
  EXPECT_THAT(error({"rain"}, {"rain"}), AllOf(HasSubstr("train.data.csv.targets: column \"rain\""),
                                               HasSubstr("train.data.csv.inputs")));
  scratch.Write("b.csv", "temp,rain,note,note\n1,2,4,5\n");
  EXPECT_EQ(UserErrorOf([&] { ReadCsv(scratch / "b.csv", {"temp"}, {"rain"}, false); }), "")
      << "note is not used";
}

TEST(Csv, NamesLineAndColumnOfWhatIsWrong) {
  const Scratch scratch;
  const auto error = [&](const std::string& text, bool classes = false) {
    scratch.Write("bad.csv", text);
    return UserErrorOf([&] { ReadCsv(scratch / "bad.csv", {"temp"}, {"rain"}, classes); });
  };
  EXPECT_EQ(error("temp,rain\n1,2\n"), "");
  EXPECT_THAT(error("temp,rain\n1,2\nwarm,3\n"),
              AllOf(HasSubstr("line 3, column \"temp\""), HasSubstr("\"warm\" is not a number")));
  EXPECT_THAT(error("temp,rain\n\"1\n\",2\n"), HasSubstr("line 2, column \"temp\""));
  EXPECT_THAT(error("note,temp,rain\n\"a\nb\",1,2\nx,1,\n"),
              AllOf(HasSubstr("line 4, column \"rain\""), HasSubstr("is empty")));
  EXPECT_THAT(error("temp,rain\n1,2\n1,2,3\n"),
              HasSubstr("line 3: has 3 fields, the header has 2"));
  EXPECT_THAT(error("temp,rain\n1\n"), HasSubstr("line 2: has 1 fields"));
  EXPECT_THAT(error("tmp,rain\n1,2\n"),
              AllOf(HasSubstr("no column \"temp\""), HasSubstr("did you mean \"tmp\"")));
  EXPECT_THAT(error("temp,rain\n"), HasSubstr("no rows"));
  EXPECT_THAT(error(""), HasSubstr("is empty"));
  EXPECT_THAT(error("temp,rain\n\"1,2\n"), HasSubstr("line 2: a quoted field does not end"));
  EXPECT_THAT(error("temp,rain\n\"1\"x,2\n"), HasSubstr("follows a closing quote"));
  EXPECT_THAT(error("temp,rain\n1,0.5\n", true), HasSubstr("not a class number"));
  EXPECT_THAT(error("temp,rain\n1,-1\n", true), HasSubstr("not a class number"));
  EXPECT_THAT(UserErrorOf([&] {
                ReadCsv(scratch / "bad.csv", {"temp"}, {"temp", "rain"}, true);
              }),
              HasSubstr("one column, not 2"));
}

}  // namespace
}  // namespace itwin::worker

#include "common/ids.h"

#include <gmock/gmock.h>

#include <set>

#include "tests/testing/status_matchers.h"

namespace itwin {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::HasSubstr;

TEST(JobId, HasOneSpelling) {
  ASSERT_OK(JobId::Parse("0123456789abcdef"));
  EXPECT_EQ(JobId::Parse("0123456789abcdef")->text(), "0123456789abcdef");
  for (const char* text : {"", "0123456789abcde", "0123456789abcdef0", "0123456789ABCDEF", "0123456789abcdeg",
                           "../456789abcdef0", "0123456789abcde\n"}) {
    EXPECT_THAT(JobId::Parse(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("16 hex digits"))) << text;
  }
}

TEST(JobId, IsRandom) {
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) {
    const JobId id = JobId::Random();
    EXPECT_OK(JobId::Parse(id.text()));
    seen.insert(id.text());
  }
  EXPECT_EQ(seen.size(), 1000u);
}

TEST(AttemptKey, IsReadBack) {
  const AttemptKey key(*JobId::Parse("0123456789abcdef"), 12);
  EXPECT_EQ(key.text(), "0123456789abcdef-12");
  EXPECT_EQ(AttemptKey::Parse(key.text()).value(), key);
  EXPECT_EQ(AttemptKey::Parse("0123456789abcdef-999999")->number(), 999'999);
}

TEST(AttemptKey, HasOneSpelling) {
  for (const char* text : {"", "-", "0123456789abcdef", "0123456789abcdef-", "0123456789abcdef-0", "0123456789abcdef-01",
                           "0123456789abcdef-+1", "0123456789abcdef--1", "0123456789abcdef- 1", "0123456789abcdef-1 ",
                           "0123456789abcdef-1000000", "0123456789abcdef-1x", "0123456789abcde-1", "x-1"}) {
    EXPECT_THAT(AttemptKey::Parse(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("attempt key"))) << text;
  }
}

TEST(RandomHex, HasTwoDigitsPerByte) {
  EXPECT_EQ(RandomHex(8).size(), 16u);
  EXPECT_NE(RandomHex(8), RandomHex(8));
}

}  // namespace
}  // namespace itwin

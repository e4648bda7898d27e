#include "common/log.h"

#include <gmock/gmock.h>

#include "common/check.h"
#include "tests/testing/status_matchers.h"

namespace itwin {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Log, WritesTimeLevelProgramAndMessage) {
  ASSERT_OK(InitLog("itwin-test", "info"));
  ::testing::internal::CaptureStderr();
  log::Info("job {} is {}", 7, "here");
  log::Debug("not shown");
  const std::string out = ::testing::internal::GetCapturedStderr();
  EXPECT_THAT(out, ::testing::MatchesRegex("[0-9T:.+-]+ itwin-test info: job 7 is here\n"));
}

TEST(Log, KnowsItsLevels) {
  for (const char* level : {"debug", "info", "warning", "error", "off"}) EXPECT_OK(InitLog("t", level)) << level;
  EXPECT_THAT(InitLog("t", "loud"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'loud' is unknown; use debug")));
}

TEST(Check, EndsTheProcessAndSaysWhere) {
  EXPECT_DEATH(ITWIN_CHECK(1 + 1 == 3), "log_test.cc:[0-9]+: broken invariant: 1 \\+ 1 == 3");
  ITWIN_CHECK(1 + 1 == 2);
}

}  // namespace
}  // namespace itwin

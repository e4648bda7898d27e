#include "common/job_state_proto.h"

#include <gmock/gmock.h>

#include "tests/testing/status_matchers.h"

namespace itwin {
namespace {

TEST(JobStateProto, EveryStateTravels) {
  for (JobState state : AllJobStates()) {
    EXPECT_EQ(FromProto(ToProto(state)).value(), state);
    EXPECT_EQ(v1::JobState_Name(ToProto(state)), "JOB_STATE_" + std::string(Name(state)));
  }
  EXPECT_EQ(v1::JobState_MAX, static_cast<int>(AllJobStates().size()));
}

TEST(JobStateProto, OtherNumbersAreRefused) {
  for (int number : {0, 14, -1, 99}) {
    EXPECT_EQ(FromProto(static_cast<v1::JobState>(number)).status().code(), absl::StatusCode::kInvalidArgument) << number;
  }
}

TEST(JobStateProto, EveryFailureClassTravels) {
  for (int i = 0; i <= static_cast<int>(FailureClass::kUnknown); ++i) {
    EXPECT_EQ(static_cast<int>(ToProto(static_cast<FailureClass>(i))), i);
  }
}

}  // namespace
}  // namespace itwin

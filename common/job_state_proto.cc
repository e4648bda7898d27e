#include "common/job_state_proto.h"

#include "absl/strings/str_cat.h"

namespace itwin {

v1::JobState ToProto(JobState state) { return static_cast<v1::JobState>(state); }
v1::FailureClass ToProto(FailureClass failure) { return static_cast<v1::FailureClass>(failure); }

absl::StatusOr<JobState> FromProto(v1::JobState state) {
  if (state < v1::JOB_STATE_QUEUED || state > v1::JOB_STATE_CANCELLED) {
    return absl::InvalidArgumentError(absl::StrCat(static_cast<int>(state), " is no job state"));
  }
  return static_cast<JobState>(state);
}

static_assert(static_cast<int>(JobState::kCancelled) == v1::JOB_STATE_CANCELLED);
static_assert(static_cast<int>(JobState::kCollecting) == v1::JOB_STATE_COLLECTING);
static_assert(static_cast<int>(FailureClass::kUnknown) == v1::FAILURE_CLASS_UNKNOWN);

}  // namespace itwin

#pragma once

#include "absl/status/statusor.h"
#include "common/job_state.h"
#include "itwin/v1/jobs.pb.h"

namespace itwin {

// proto3 enums are open; ours are closed. Unknown wire values are a bug of ours: they abort.
v1::JobState ToProto(JobState state);
v1::FailureClass ToProto(FailureClass failure);
// kInvalidArgument for a number that is no state.
absl::StatusOr<JobState> FromProto(v1::JobState state);

}  // namespace itwin
